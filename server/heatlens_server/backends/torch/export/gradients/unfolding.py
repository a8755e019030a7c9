"""The gradient of overlapping windows: every element is the sum of what its windows give back."""

from collections.abc import Sequence

from torch import Tensor

from heatlens_server.backends.torch.export.gradients.separable import contract


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
