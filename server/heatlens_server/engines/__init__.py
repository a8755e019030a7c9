"""Several ways to run a model, one interface."""
