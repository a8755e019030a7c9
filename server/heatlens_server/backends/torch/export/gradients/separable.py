"""Resizing as one matrix product per spatial dimension, which is linear and so has its transpose as gradient.

Average pooling and interpolation compute each output as a weighted sum of inputs, with weights that are a product of
one factor per dimension: y = A_h x A_w^T for an image x. The gradient is then A_h^T g A_w.
"""

from collections.abc import Sequence

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
