"""Queue, batches and device threads. Knows engines only by their interface."""
