"""Interpolation, whose gradient is the transpose of the weights that it applies in one dimension after the other.

Left alone, PyTorch's tracer takes interpolation apart into gathers, and its gradient into scatters with one index per
element.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from heatlens_server.backends.torch.export.gradients.separable import Matrix, contract, transpose

aten = torch.ops.aten

Flags = tuple[bool, ...]
"""(align_corners,) for the operators that have it, () for the nearest-neighbour ones."""


def repeat_elements(values: Tensor, factors: Sequence[int]) -> Tensor:
    """Repeat each element along the trailing dimensions; not recorded by autograd.

    It is nearest-neighbour interpolation, which runtimes have a fast kernel for: expanding an inserted dimension
    took onnxruntime a hundred times as long.

    Args:
        values: (N, C, s_1, ..., s_n), or (C, s_1, ..., s_n); n = 1, 2 or 3.
        factors: n counts, each at least 1.

    Returns:
        (..., s_1 * factor_1, ..., s_n * factor_n).
    """
    rank = len(factors)
    operator = (aten.upsample_nearest1d, aten.upsample_nearest2d, aten.upsample_nearest3d)[rank - 1].default
    sizes = [size * factor for size, factor in zip(values.shape[-rank:], factors, strict=True)]
    if values.ndim == rank + 1:
        return _untraced(operator, values.unsqueeze(0), sizes).squeeze(0)
    return _untraced(operator, values, sizes)


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
    before = [int(size) for size in values.shape[2:]]
    after = [int(size) for size in output_size]
    if before == after and all(scale in {None, 1.0} for scale in scales):
        return values
    # Half precision is interpolated with weights computed in float32.
    dtype = values.dtype if values.dtype == torch.float64 else torch.float32
    matrices = [
        _weights(operator, i, o, flags, scale, rank=len(before), dtype=dtype)
        for i, o, scale in zip(before, after, scales, strict=True)
    ]
    factors = [o // i for i, o in zip(before, after, strict=True)]
    if all(_repeats(matrix, factor) for matrix, factor in zip(matrices, factors, strict=True)):
        result: Tensor = _Repetition.apply(values, factors)
    elif flags and all(scale is None or scale * i == o for i, o, scale in zip(before, after, scales, strict=True)):
        result = _Interpolation.apply(values, operator, (after, *flags), matrices)
    else:
        # ONNX knows no scale but the sizes' ratio, and rounds to other neighbours where two are equally near.
        result = contract(values, matrices)
    return result


def _untraced(operator: Callable[..., Tensor], *arguments: object) -> Tensor:
    # What the tracer replaces interpolation by is registered for autograd.
    with torch._C._AutoDispatchBelowAutograd():  # noqa: SLF001 - there is no other name for it
        return operator(*arguments)


class _Repetition(torch.autograd.Function):
    """Nearest neighbour by whole factors; its gradient sums disjoint windows."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, factors: Sequence[int]) -> Tensor:  # noqa: ANN401
        ctx.factors = factors
        return repeat_elements(values, factors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        (grad,), factors = grads, ctx.factors
        mean = (aten.avg_pool1d, aten.avg_pool2d, aten.avg_pool3d)[len(factors) - 1]
        return mean(grad, factors) * math.prod(factors), None


class _Interpolation(torch.autograd.Function):
    """An operator as it is, and its weights to differentiate it with."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        values: Tensor,
        operator: Callable[..., Tensor],
        arguments: tuple[object, ...],
        matrices: Sequence[Matrix],
    ) -> Tensor:
        ctx.matrices = matrices
        return _untraced(operator, values, *arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        return contract(grads[0], [transpose(matrix) for matrix in ctx.matrices]), None, None, None


def _repeats(matrix: Matrix, factor: int) -> bool:
    """Whether a matrix repeats each input `factor` times, as nearest neighbour by a whole factor does."""
    return all(
        row == [float(i * factor <= o < (i + 1) * factor) for o in range(len(row))] for i, row in enumerate(matrix)
    )


@lru_cache(maxsize=32)
def _weights(
    operator: Callable[..., Tensor],
    before: int,
    after: int,
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
        before: number of inputs.
        after: number of outputs.
        flags: align_corners, if the operator has it.
        scale: see `interpolation`.
        rank: the number of spatial dimensions.
        dtype: what to compute in.

    Returns:
        (inputs, outputs): the weight of each input in each output.
    """
    other = [1] * (rank - 1)
    # A trace may be going on: these are values, not part of it.
    with _disable_current_modes(), torch.no_grad():
        # Along the last dimension: torch 2.14's antialiased kernels ignore the weights of images one pixel wide.
        units = torch.eye(before, dtype=dtype).reshape(before, 1, *other, before)
        outputs = operator(units, [*other, after], *flags, *[None] * (rank - 1), scale)
        matrix: Matrix = outputs.reshape(before, after).tolist()
    return matrix
