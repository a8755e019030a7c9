"""Reverse-mode differentiation of ONNX graphs: a backward pass as ONNX operators. No PyTorch in here."""
