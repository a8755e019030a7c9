"""Matrix products that stay products of matrices, with no copy of an operand along the batch.

torch.matmul expands its operands to a common batch shape before it multiplies. That is free in eager mode, where an
expanded tensor shares its memory, but the exported graph then holds an Expand that a runtime may really carry out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def reshape(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Give (...) another shape, with a copy where the strides ask for one."""
    return values.reshape(tuple(sizes))


def times_matrix(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (..., k) with a matrix (k, m) as one matrix product: (..., m)."""
    if left.ndim == 2:
        return torch.mm(left, right)
    rows = _rows(left)
    return torch.mm(rows, right).reshape(*left.shape[:-1], right.shape[-1])


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """Multiply as torch.matmul does, without expanding where the batch shapes are equal or there is one matrix.

    Args:
        left: (..., n, k), or (k,).
        right: (..., k, m), or (k,).

    Returns:
        What torch.matmul returns.
    """
    if left.ndim >= 2 and right.ndim == 2:
        return times_matrix(left, right)
    if left.ndim == right.ndim >= 3 and left.shape[:-2] == right.shape[:-2]:
        product = torch.bmm(_merge_batch(left), _merge_batch(right))
        return product.reshape(*left.shape[:-1], right.shape[-1])
    return torch.matmul(left, right)


def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer as one matrix product, whatever the number of leading dimensions.

    Args:
        values: (..., i).
        weight: (o, i).
        bias: (o,), or None.

    Returns:
        (..., o): values weight^T + bias.
    """
    if weight.ndim != 2:
        return torch.nn.functional.linear(values, weight, bias)
    if bias is None:
        return times_matrix(values, weight.t())
    rows = _rows(values)
    return torch.addmm(bias, rows, weight.t()).reshape(*values.shape[:-1], weight.shape[0])


def _rows(values: Tensor) -> Tensor:
    # Not -1, which the tracer turns into a division of symbols.
    return values if values.ndim == 2 else values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def _merge_batch(values: Tensor) -> Tensor:
    return values if values.ndim == 3 else values.reshape(math.prod(values.shape[:-2]), *values.shape[-2:])
