"""What runs models: exported graphs without PyTorch, and PyTorch."""
