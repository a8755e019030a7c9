"""Naming what every pixel shows."""
