"""Gradients of taking a part of a tensor: the part, surrounded by zeros. And of overwriting one.

Writing the part into a tensor of zeros, as PyTorch's own decompositions do, becomes a scatter with an index for every
element in ONNX. Padding is a plain copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten


def select_backward(grad: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    """Differentiate source.select(dim, index).

    Args:
        grad: the gradient with respect to the output.
        sizes: the source's shape.
        dim: the dimension that `grad` lacks.
        index: the element chosen, negative counts from the end.

    Returns:
        (*sizes), the dtype of `grad`.
    """
    dim %= len(sizes)
    index = index + sizes[dim] if index < 0 else index
    return _pad(grad.unsqueeze(dim), dim, index, sizes[dim] - index - 1)


def slice_backward(  # noqa: PLR0917 - the operator's signature
    grad: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int
) -> Tensor:
    """Differentiate source[start:end:step] along one dimension.

    Args:
        grad: the gradient with respect to the output.
        sizes: the source's shape.
        dim: the dimension sliced.
        start: the first element, negative counts from the end.
        end: not used: `grad` has as many elements as were taken.
        step: distance of the elements, at least 1.

    Returns:
        (*sizes), the dtype of `grad`.
    """
    del end
    dim %= len(sizes)
    size, taken = sizes[dim], grad.shape[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    if step > 1:
        # Each element and the zeros up to the next one; the last one's zeros may pass the end and are cut again.
        spaced = _pad(grad.unsqueeze(dim + 1), dim + 1, 0, step - 1)
        grad = spaced.reshape(*sizes[:dim], taken * step, *sizes[dim + 1 :])
    return _pad(grad, dim, start, size - start - taken * step)


def copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:  # noqa: ARG001 - the operator's signature
    """Overwrite all of a tensor: what functional graphs make of `target.copy_(source)`.

    Args:
        target: only its shape and dtype are used.
        source: broadcasts to the target's shape.
        non_blocking: not used.

    Returns:
        The source in the target's shape and dtype, differentiable by the source.
    """
    return source.to(target.dtype).expand_as(target)


def _pad(values: Tensor, dim: int, before: int, after: int) -> Tensor:
    if after < 0:
        values = values.narrow(dim, 0, values.shape[dim] + after)
        after = 0
    if before == 0 and after == 0:
        return values
    padded: Tensor = aten.constant_pad_nd(values, [0, 0] * (values.ndim - 1 - dim) + [before, after])
    return padded
