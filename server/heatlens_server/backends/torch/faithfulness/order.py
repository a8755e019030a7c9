"""The order in which a map says pixels matter."""

import torch
from torch import Tensor


def places(saliency: Tensor, *, most_first: bool = True) -> Tensor:
    """Every pixel's place in the order of saliency; equal pixels are in the order of their index, row by row.

    So the order of every map, a flat one included, is defined and the same on every device. The first n pixels are
    `places(saliency) < n`.

    Args:
        saliency: (h, w) floating point.
        most_first: whether place 0 is the most salient pixel's, not the least salient one's.

    Returns:
        int64 (h, w), each of 0 ... h * w - 1 once.
    """
    order = torch.argsort(saliency.flatten(), descending=most_first, stable=True)
    found = torch.empty_like(order)
    found[order] = torch.arange(order.numel(), device=order.device)
    return found.reshape(saliency.shape)
