"""The precision that map maths runs in: never less than float32."""

import torch
from torch import Tensor

_HALF = frozenset({torch.float16, torch.bfloat16})


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: float32 for float16 and bfloat16, the dtype itself otherwise."""
    return torch.float32 if dtype in _HALF else dtype


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype to sum in; itself, uncopied, if it has that already."""
    return tensor.to(accumulator(tensor.dtype))
