"""Methods that run the model many times, in steps."""
