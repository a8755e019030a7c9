"""Operators in forms whose gradients can be exported."""
