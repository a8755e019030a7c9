"""Differentiating a model into one static graph."""
