"""Finding things and drawing boxes around them."""
