"""Exported graphs: manifest, cache, and the onnxruntime engine. Needs no PyTorch."""
