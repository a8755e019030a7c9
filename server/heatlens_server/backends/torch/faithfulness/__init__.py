"""Measures of how faithful a map is, as pure generators of tensors."""
