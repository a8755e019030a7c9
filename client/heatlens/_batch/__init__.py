"""Explaining stored images in bulk: what goes in, and the table that comes out."""
