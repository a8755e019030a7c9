"""The precision that map maths runs in: never less than float32."""

import torch
from torch import Tensor

_HALF = frozenset({torch.float16, torch.bfloat16})


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for float16 and bfloat16, the dtype itself otherwise."""
    return torch.float32 if dtype in _HALF else dtype


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in the dtype to sum in; itself, uncopied, if it has that already."""
    return tensor.to(accumulator(tensor.dtype))


FP16_GRADIENT_SCALE = 2.0**8
"""What a float16 score is multiplied by before it is differentiated, and its gradients divided by, in float32: exact.

Gradients of a logit with respect to a deep layer are often below float16's smallest normal number (6e-5).
"""
