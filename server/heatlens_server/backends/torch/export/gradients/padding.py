"""Gradients of padding with the input's own elements: each element gets the sum over its copies."""

from collections.abc import Callable, Sequence

from torch import Tensor

from heatlens_server.backends.torch.export.gradients.separable import contract


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
