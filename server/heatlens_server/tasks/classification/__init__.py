"""Naming what an image shows: one class of many, or any of them (multi-label)."""
