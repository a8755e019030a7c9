"""Differentiating a network into a static graph; writing, reading and verifying it."""
