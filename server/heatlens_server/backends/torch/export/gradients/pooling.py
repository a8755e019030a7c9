"""Gradients of average and max pooling, in one, two or three spatial dimensions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.export.gradients.separable import Matrix, contract, transpose
from heatlens_server.backends.torch.export.gradients.upsampling import repeat_elements

aten = torch.ops.aten


def avg_pool_backward(  # noqa: PLR0917 - the operator's signature
    grad: Tensor,
    source: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,  # noqa: ARG001 - the output's size says the same
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Differentiate average pooling: each input gets its share of the windows that it lies in.

    Args:
        grad: (..., o_1, ..., o_n), the gradient with respect to the output.
        source: (..., i_1, ..., i_n), the input; only its spatial sizes are used.
        kernel_size: n sizes of the window, or one for all; so are stride and padding.
        stride: distance of the windows; empty for the kernel's size.
        padding: zeros on each side of the input.
        ceil_mode: not used.
        count_include_pad: whether zeros of the padding count in the divisor.
        divisor_override: the divisor of every window; None for the number of its elements.

    Returns:
        (..., i_1, ..., i_n), the dtype of `grad`.
    """
    rank = _rank(kernel_size, source)
    kernel = _per_dimension(kernel_size, rank)
    step = _per_dimension(stride, rank) if stride else kernel
    pad = _per_dimension(padding, rank)
    before, after = [int(size) for size in source.shape[-rank:]], [int(size) for size in grad.shape[-rank:]]
    if step == kernel and not any(pad) and all(o * k <= i for i, o, k in zip(before, after, kernel, strict=True)):
        return _share_out(grad / (divisor_override or math.prod(kernel)), kernel, before)
    matrices = [
        _window_shares(
            before[d],
            [
                (o * step[d] - pad[d], min(o * step[d] - pad[d] + kernel[d], before[d] + pad[d]))
                for o in range(after[d])
            ],
            count_outside=count_include_pad,
            divided=divisor_override is None,
        )
        for d in range(rank)
    ]
    return contract(grad if divisor_override is None else grad / divisor_override, matrices)


def adaptive_avg_pool(values: Tensor, output_size: Sequence[int], *, rank: int) -> Tensor:
    """Average to a given size in operators that differentiate well: a mean, plain pooling, or matrix products.

    Args:
        values: (..., i_1, ..., i_rank), floating point.
        output_size: rank sizes, or one for all.
        rank: the number of spatial dimensions.

    Returns:
        (..., *output_size), the dtype of `values`.
    """
    before = [int(size) for size in values.shape[-rank:]]
    after = _per_dimension(output_size, rank)
    if all(size == 1 for size in after):
        return values.mean(tuple(range(-rank, 0)), keepdim=True)
    if before == after:
        return values
    if rank == 2 and all(i % o == 0 for i, o in zip(before, after, strict=True)):
        return torch.nn.functional.avg_pool2d(values, [i // o for i, o in zip(before, after, strict=True)])
    return contract(values, [transpose(adaptive_shares(i, o)) for i, o in zip(before, after, strict=True)])


def adaptive_max_pool(values: Tensor, output_size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Take maxima to a given size; as plain max pooling where the windows are of one size.

    Args:
        values: (..., h, w).
        output_size: (height, width), or one number for both.

    Returns:
        The maxima (..., *output_size) and their flat indices into (h, w), int64.
    """
    before = [int(size) for size in values.shape[-2:]]
    after = _per_dimension(output_size, 2)
    if all(i % o == 0 for i, o in zip(before, after, strict=True)):
        kernel = [i // o for i, o in zip(before, after, strict=True)]
        maxima: tuple[Tensor, Tensor] = aten.max_pool2d_with_indices(values, kernel, kernel)
    else:
        maxima = aten.adaptive_max_pool2d(values, after)
    return maxima


def adaptive_avg_pool_backward(grad: Tensor, source: Tensor, *, rank: int) -> Tensor:
    """Differentiate adaptive average pooling to the size of `grad`.

    Args:
        grad: (..., o_1, ..., o_rank), the gradient with respect to the output.
        source: (..., i_1, ..., i_rank), the input; only its spatial sizes are used.
        rank: the number of spatial dimensions.

    Returns:
        (..., i_1, ..., i_rank), the dtype of `grad`.
    """
    before, after = [int(size) for size in source.shape[-rank:]], [int(size) for size in grad.shape[-rank:]]
    if all(i % o == 0 for i, o in zip(before, after, strict=True)):
        kernel = [i // o for i, o in zip(before, after, strict=True)]
        return _share_out(grad / math.prod(kernel), kernel, before)
    return contract(grad, [adaptive_shares(i, o) for i, o in zip(before, after, strict=True)])


def adaptive_shares(before: int, after: int) -> Matrix:
    """Tell what share of each of `before` inputs is in each of `after` adaptive windows.

    Window o spans floor(o * before / after) to ceil((o + 1) * before / after), so windows may overlap.

    Returns:
        (after, before) weights; each row sums to 1.
    """
    windows = [(o * before // after, -((o + 1) * before // -after)) for o in range(after)]
    return _window_shares(before, windows, count_outside=True, divided=True)


def max_pool_with_indices_backward(  # noqa: PLR0917 - the operator's signature
    grad: Tensor,
    source: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],  # noqa: ARG001
    padding: Sequence[int],  # noqa: ARG001
    dilation: Sequence[int],  # noqa: ARG001
    ceil_mode: bool,  # noqa: ARG001
    indices: Tensor,
) -> Tensor:
    """Differentiate max pooling: each window's gradient goes to the input that the window chose.

    Args:
        grad: (..., o_1, ..., o_n), the gradient with respect to the output.
        source: (..., i_1, ..., i_n), the input; only its spatial sizes are used.
        kernel_size: n sizes of the window, or one for all.
        stride: not used, since `indices` say it all; nor are padding, dilation and ceil_mode.
        padding: not used.
        dilation: not used.
        ceil_mode: not used.
        indices: int64, shaped as `grad`: the chosen input as a flat index into (i_1, ..., i_n).

    Returns:
        (..., i_1, ..., i_n), the dtype of `grad`.
    """
    return scatter_to_chosen(grad, source, indices, rank=_rank(kernel_size, source))


def scatter_to_chosen(grad: Tensor, source: Tensor, indices: Tensor, *, rank: int) -> Tensor:
    """Add each gradient to the input whose flat spatial index is given.

    Args:
        grad: (..., o_1, ..., o_rank).
        source: (..., i_1, ..., i_rank); only its spatial sizes are used.
        indices: int64, shaped as `grad`, in [0, i_1 * ... * i_rank).
        rank: the number of spatial dimensions.

    Returns:
        (..., i_1, ..., i_rank), the dtype of `grad`; sums of half precision are made in float32.
    """
    sizes = source.shape[-rank:]
    leading, outputs = grad.shape[:-rank], math.prod(grad.shape[-rank:])
    wide = grad.to(torch.float32) if grad.dtype in (torch.float16, torch.bfloat16) else grad
    flat = wide.new_zeros((*leading, math.prod(sizes)))
    flat = flat.scatter_add(-1, indices.reshape(*leading, outputs), wide.reshape(*leading, outputs))
    return flat.reshape(*leading, *sizes).to(grad.dtype)


def _share_out(values: Tensor, kernel: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Give each element to its window of adjacent, disjoint windows; what is left of `sizes` gets 0."""
    left_over = [size - o * k for size, o, k in zip(sizes, values.shape[-len(kernel) :], kernel, strict=True)]
    shared = repeat_elements(values, kernel)
    if not any(left_over):
        return shared
    padded: Tensor = aten.constant_pad_nd(shared, [pad for size in reversed(left_over) for pad in (0, size)])
    return padded


def _window_shares(size: int, windows: Sequence[tuple[int, int]], *, count_outside: bool, divided: bool) -> Matrix:
    """Weights of an average over [start, end) windows that may reach out of [0, size).

    Returns:
        (windows, size): 1 / count inside the window, 0 outside; 1 instead if not `divided`.
    """
    rows = []
    for start, end in windows:
        inside = range(max(start, 0), min(end, size))
        count = (end - start if count_outside else len(inside)) if divided else 1
        rows.append([1 / count if i in inside else 0.0 for i in range(size)])
    return rows


def _rank(kernel_size: Sequence[int], source: Tensor) -> int:
    # A single number stands for all dimensions in operators of the two-dimensional family.
    return len(kernel_size) if len(kernel_size) > 1 else min(source.ndim - 1, 2)


def _per_dimension(values: Sequence[int], rank: int) -> list[int]:
    return list(values) * rank if len(values) == 1 else list(values)
