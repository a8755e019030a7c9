"""From encoded bytes to the model's input pixels, without torch."""
