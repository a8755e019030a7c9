"""The queue of one model, its batches and its device threads."""
