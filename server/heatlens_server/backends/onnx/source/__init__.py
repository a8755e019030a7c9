"""ONNX files of anybody's as a source of models."""
