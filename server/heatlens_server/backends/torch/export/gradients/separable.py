"""Resizing, padding and unfolding as one matrix product per dimension, which is linear: its transpose is the gradient.

Average pooling and interpolation compute each output as a weighted sum of inputs, with weights that are a product of
one factor per dimension: y = A_h x A_w^T for an image x. The gradient is then A_h^T g A_w. Where elements are copied,
as in padding and overlapping windows, each element gets the sum over its copies.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.export.gradients.products import times_matrix

Matrix = list[list[float]]
"""Rows of a constant matrix. Plain numbers: a tensor made outside a trace cannot be used inside it."""


def contract(values: Tensor, matrices: Sequence[Matrix | None]) -> Tensor:
    """Multiply the trailing dimensions of a tensor with one constant matrix each.

    Args:
        values: (..., s_1, ..., s_n), floating point.
        matrices: n matrices, the d-th of shape (s_d, t_d), or None to leave that dimension alone.

    Returns:
        (..., t_1, ..., t_n), of the dtype and device of `values`: the sum over s_d of values[s_d] matrix_d[s_d, t_d].
    """
    for dim, matrix in zip(range(-1, -len(matrices) - 1, -1), reversed(matrices), strict=True):
        if matrix is None:
            continue
        constant = torch.tensor(matrix, dtype=values.dtype, device=values.device)
        # A product with a 2-D matrix on the right is one large product; on the left it would be one per image.
        values = times_matrix(values.transpose(dim, -1), constant).transpose(dim, -1)
    return values


def transpose(matrix: Matrix) -> Matrix:
    """Swap rows and columns."""
    return [list(column) for column in zip(*matrix, strict=True)]


def replication_pad_backward(grad: Tensor, source: Tensor, padding: Sequence[int]) -> Tensor:
    """Differentiate padding that repeats the border.

    Args:
        grad: (..., o_1, ..., o_n), the gradient with respect to the output.
        source: (..., i_1, ..., i_n), the input; only its spatial sizes are used.
        padding: (before, after) of the last dimension, then of the one before it, and so on; negative crops.

    Returns:
        (..., i_1, ..., i_n), the dtype of `grad`.
    """
    return _backward(grad, source, padding, lambda position, size: min(max(position, 0), size - 1))


def reflection_pad_backward(grad: Tensor, source: Tensor, padding: Sequence[int]) -> Tensor:
    """Differentiate padding that mirrors at the border, which is not repeated. See `replication_pad_backward`."""
    return _backward(grad, source, padding, lambda position, size: size - 1 - abs(size - 1 - abs(position)))


def _backward(grad: Tensor, source: Tensor, padding: Sequence[int], origin: Callable[[int, int], int]) -> Tensor:
    matrices = []
    for d, before in enumerate(reversed(padding[::2])):
        dim = d - len(padding) // 2
        size, padded = int(source.shape[dim]), int(grad.shape[dim])
        origins = [origin(position - before, size) for position in range(padded)]
        matrices.append([[float(i == chosen) for i in range(size)] for chosen in origins])
    return contract(grad, matrices)


def unfold_backward(grad: Tensor, sizes: Sequence[int], dim: int, size: int, step: int) -> Tensor:
    """Differentiate source.unfold(dim, size, step).

    A product with a constant matrix of zeros and ones. PyTorch's own rule adds into zeros by an index of 32 bits, which
    ONNX has no form for.

    Args:
        grad: the gradient with respect to the output: windows at `dim`, their elements in the last dimension.
        sizes: the source's shape.
        dim: the dimension that was taken apart.
        size: elements of a window.
        step: distance of the windows' first elements.

    Returns:
        (*sizes), the dtype of `grad`.
    """
    dim %= len(sizes)
    windows = int(grad.shape[dim])
    matrix = [
        [1.0 if position == window * step + element else 0.0 for position in range(sizes[dim])]
        for window in range(windows)
        for element in range(size)
    ]
    # The windows' elements beside the windows, both together last.
    order = [*range(dim), *range(dim + 1, len(sizes)), dim, len(sizes)]
    columns = grad.permute(order).reshape(*sizes[:dim], *sizes[dim + 1 :], windows * size)
    summed = contract(columns, [matrix])
    return summed.movedim(-1, dim)
