"""The heatlens server: holds image models, batches requests, explains predictions."""
