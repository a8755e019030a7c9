"""Methods that take one pass, or a few, and are no function of activations and gradients alone."""
