"""Interpolation as matrix products, whose gradients are matrix products again.

PyTorch's tracer takes interpolation apart into gathers, and so its gradient into scatters with one index per element.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from heatlens_server.export.gradients.separable import Matrix, contract, spread

Flags = tuple[bool, ...]
"""(align_corners,) for the operators that have it, () for the nearest-neighbour ones."""


def interpolation(operator: Callable[..., Tensor], *, aligned: bool) -> Callable[..., Tensor]:
    """Make a differentiable replacement of an interpolation operator.

    Args:
        operator: its `default` overload, which is asked for its weights: (values, output_size, [align_corners,]
            *scales).
        aligned: whether it has the argument align_corners.

    Returns:
        A function of the operator's arguments: values (N, C, i_1, ..., i_n) to (N, C, *output_size). A scale is the
        factor that positions are computed with in one dimension; None, or none at all, for the ratio of the sizes.
    """

    def interpolate(values: Tensor, output_size: Sequence[int], *options: Any) -> Tensor:  # noqa: ANN401
        flags, scales = options[:aligned], options[aligned:]
        return _interpolate(operator, values, output_size, flags, scales or [None] * len(output_size))

    return interpolate


def interpolation_vec(operator: Callable[..., Tensor], *, aligned: bool) -> Callable[..., Tensor]:
    """Make a replacement of the operator's overload `vec`, which takes a size or factors, and one list of factors.

    Args:
        operator: the `default` overload.
        aligned: whether it has the argument align_corners.

    Returns:
        (values, output_size or None, [align_corners,] scale_factors or None) -> (N, C, o_1, ..., o_n).
    """

    def interpolate(values: Tensor, output_size: Sequence[int] | None, *options: Any) -> Tensor:  # noqa: ANN401
        flags = options[:aligned]
        if output_size is not None:
            return _interpolate(operator, values, output_size, flags, [None] * len(output_size))
        factors: Sequence[float] = options[aligned]
        # Rounded down as the operator rounds.
        sizes = [int(size * factor) for size, factor in zip(values.shape[2:], factors, strict=True)]
        return _interpolate(operator, values, sizes, flags, factors)

    return interpolate


def _interpolate(
    operator: Callable[..., Tensor],
    values: Tensor,
    output_size: Sequence[int],
    flags: Flags,
    scales: Sequence[float | None],
) -> Tensor:
    # Half precision is interpolated with weights computed in float32.
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    sizes = [(int(before), int(after)) for before, after in zip(values.shape[2:], output_size, strict=True)]
    matrices = [
        None
        if size[0] == size[1] and scale in {None, 1.0}
        else _weights(operator, size, flags, scale, rank=len(sizes), dtype=dtype)
        for size, scale in zip(sizes, scales, strict=True)
    ]
    factors = [after // before for before, after in sizes]
    if all(_repeats(matrix, factor) for matrix, factor in zip(matrices, factors, strict=True)):
        return spread(values, factors)
    return contract(values, matrices)


def _repeats(matrix: Matrix | None, factor: int) -> bool:
    """Whether a matrix repeats each input `factor` times, as nearest neighbour does; None is the identity."""
    if matrix is None:
        return True
    return all(
        row == [float(i * factor <= o < (i + 1) * factor) for o in range(len(row))] for i, row in enumerate(matrix)
    )


@lru_cache(maxsize=256)
def _weights(
    operator: Callable[..., Tensor],
    sizes: tuple[int, int],
    flags: Flags,
    scale: float | None,
    *,
    rank: int,
    dtype: torch.dtype,
) -> Matrix:
    """Compute one dimension's weights, by interpolating each unit vector with the operator itself.

    Its rounding of positions decides which neighbour is nearest, and cannot be had otherwise.

    Args:
        operator: with `rank` spatial dimensions.
        sizes: number of inputs and of outputs.
        flags: align_corners, if the operator has it.
        scale: see `interpolation`.
        rank: the number of spatial dimensions.
        dtype: what to compute in.

    Returns:
        (inputs, outputs): the weight of each input in each output.
    """
    before, after = sizes
    other = [1] * (rank - 1)
    # A trace may be going on: these are values, not part of it.
    with _disable_current_modes(), torch.no_grad():
        # Along the last dimension: torch 2.14's antialiased kernels ignore the weights of images one pixel wide.
        units = torch.eye(before, dtype=dtype).reshape(before, 1, *other, before)
        outputs = operator(units, [*other, after], *flags, *[None] * (rank - 1), scale)
        matrix: Matrix = outputs.reshape(before, after).tolist()
    return matrix
