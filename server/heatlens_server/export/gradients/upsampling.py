"""Gradients of interpolation: the transpose of the weights that interpolation applies, one dimension at a time."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from heatlens_server.export.gradients.separable import Matrix, contract, transpose

aten = torch.ops.aten

Scale = float | None
Interpolation = Callable[..., Tensor]
"""(values (N, C, i_1, ..., i_n), output_size, [align_corners,] *scales) -> (N, C, o_1, ..., o_n)."""


def aligned_upsample_backward(forward: Interpolation) -> Callable[..., Tensor]:
    """Make the gradient of an interpolation operator that has the argument align_corners.

    Returns:
        (grad, output_size, input_size, align_corners, *scales) -> input gradient, as `upsample_backward`.
    """

    def backward(
        grad: Tensor, output_size: Sequence[int], input_size: Sequence[int], align_corners: bool, *scales: Scale
    ) -> Tensor:
        return _backward(forward, grad, output_size, input_size, (align_corners,), scales)

    return backward


def upsample_backward(forward: Interpolation) -> Callable[..., Tensor]:
    """Make the gradient of an interpolation operator that has no argument align_corners.

    Returns:
        (grad, output_size, input_size, *scales) -> (N, C, i_1, ..., i_n), the dtype of `grad`, for a grad of shape
        (N, C, o_1, ..., o_n). Scales are as the operator's own: for each dimension the factor that positions are
        computed with, None for the sizes' ratio.
    """

    def backward(grad: Tensor, output_size: Sequence[int], input_size: Sequence[int], *scales: Scale) -> Tensor:
        return _backward(forward, grad, output_size, input_size, (), scales)

    return backward


def interpolation(forward: Interpolation, *, aligned: bool) -> Callable[..., Tensor]:
    """Make an interpolation out of matrix products, whose gradient are matrix products too.

    PyTorch's tracer takes the operator itself apart into gathers, and its gradient into scatters.

    Args:
        forward: the operator, for its weights.
        aligned: whether it has the argument align_corners.

    Returns:
        (values, output_size or None, [align_corners,] scale_factors or None) -> (N, C, o_1, ..., o_n): the arguments
        of the operator's overload `vec`.
    """

    def interpolate(values: Tensor, output_size: Sequence[int] | None, *options: Any) -> Tensor:
        flags, factors = (options[:1] if aligned else ()), options[-1]
        before = [int(size) for size in values.shape[2:]]
        if output_size is None:
            after = [int(i * factor) for i, factor in zip(before, factors, strict=True)]
        else:
            after = [int(size) for size in output_size]
        return contract(values, [m and transpose(m) for m in _matrices(forward, values, before, after, flags, factors)])

    return interpolate


def _backward(
    forward: Interpolation,
    grad: Tensor,
    output_size: Sequence[int],
    input_size: Sequence[int],
    flags: tuple[bool, ...],
    scales: Sequence[Scale],
) -> Tensor:
    before, after = [int(size) for size in input_size[2:]], [int(size) for size in output_size]
    return contract(grad, _matrices(forward, grad, before, after, flags, scales))


def _matrices(
    forward: Interpolation,
    values: Tensor,
    before: Sequence[int],
    after: Sequence[int],
    flags: tuple[bool, ...],
    scales: Sequence[Scale] | None,
) -> list[Matrix | None]:
    # Half precision is interpolated with weights computed in float32.
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    return [
        None if i == o and scale in (None, 1.0) else _weights(forward, i, o, flags, scale, dtype)
        for i, o, scale in zip(before, after, scales or [None] * len(before), strict=True)
    ]


@lru_cache(maxsize=256)
def _weights(
    forward: Interpolation, before: int, after: int, flags: tuple[bool, ...], scale: Scale, dtype: torch.dtype
) -> Matrix:
    """Compute one dimension's weights, by interpolating each unit vector with the operator itself.

    Its rounding of positions decides which neighbour is nearest and cannot be had otherwise.

    Returns:
        (after, before): the weight of each input in each output.
    """
    # A trace may be going on: these are values, not part of it.
    with _disable_current_modes(), torch.no_grad():
        rank = 3 if "3d" in str(forward) else 1 if "1d" in str(forward) else 2
        units = torch.eye(before, dtype=dtype).reshape(before, 1, before, *[1] * (rank - 1))
        outputs = forward(units, [after, *[1] * (rank - 1)], *flags, scale, *[None] * (rank - 1))
        matrix: Matrix = outputs.reshape(before, after).t().tolist()
    return matrix
