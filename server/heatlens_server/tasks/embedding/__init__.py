"""Turning images into vectors that are compared."""
