"""Methods that run the model once."""
