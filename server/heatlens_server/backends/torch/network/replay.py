"""What it takes to know whether a network's part before a layer may run on one row, and the rest on many.

What bypasses the layer is then broadcast, where the network adds or multiplies it. Where it concatenates, or took the
batch's size before the layer, it fails or mixes rows: so two different rows are tried, and their whole output is
compared with what the network says when all of it runs on two rows.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import LayerOutput

_TOLERANCE = 1e-3
"""What outputs may differ by, relative to the largest, for having run on other numbers of rows."""

_ROUNDINGS = 8
"""The same for half precision, in units of its rounding."""


def first_row(output: LayerOutput) -> LayerOutput:
    """A layer's output for the first image."""
    return output[:1] if isinstance(output, Tensor) else {name: level[:1] for name, level in output.items()}


def two_rows(output: LayerOutput) -> LayerOutput:
    """A layer's output for one image, and one that is another even where the first is nothing at all."""
    if isinstance(output, Tensor):
        return torch.cat([output, 1 - output])
    return {name: torch.cat([level, 1 - level]) for name, level in output.items()}


def laid_out_like(changed: LayerOutput, output: LayerOutput) -> LayerOutput:
    """A changed output in the memory layout of the layer's own, which what follows may take views of."""
    if isinstance(changed, Tensor) and isinstance(output, Tensor):
        if output.is_contiguous():
            return changed.contiguous()
        if output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last):
            return changed.contiguous(memory_format=torch.channels_last)
    elif isinstance(changed, Mapping) and isinstance(output, Mapping):
        levels = {name: laid_out_like(changed[name], output[name]) for name in output}
        return {name: level for name, level in levels.items() if isinstance(level, Tensor)}
    return changed


def same(output: Any, other: Any, dtype: torch.dtype) -> bool:  # noqa: ANN401 - what a network returns
    """Whether two outputs of a network that runs in a dtype are the same but for rounding."""
    leaves, others = list(_leaves(output)), list(_leaves(other))
    tolerance = _TOLERANCE if dtype is torch.float32 else _ROUNDINGS * torch.finfo(dtype).eps
    return len(leaves) == len(others) and all(
        _close(one, two, tolerance) for one, two in zip(leaves, others, strict=True)
    )


def _close(one: object, other: object, tolerance: float) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and one == other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    one, other = one.detach().double(), other.detach().double()
    largest = float(torch.where(other.isfinite(), other, 0.0).abs().amax())
    return torch.allclose(one, other, rtol=0.0, atol=tolerance * largest, equal_nan=True)


def _leaves(output: Any) -> Iterator[Any]:  # noqa: ANN401 - what a network returns
    """Everything in an output that holds no other things."""
    if isinstance(output, Mapping):
        for name in output:
            yield from _leaves(output[name])
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _leaves(item)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from _leaves(getattr(output, field.name))
    else:
        yield output
