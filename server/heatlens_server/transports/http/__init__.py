"""Metrics by HTTP."""
