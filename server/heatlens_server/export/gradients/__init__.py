"""Gradients written in operators that every export format has, for the operators whose own gradient has none."""
