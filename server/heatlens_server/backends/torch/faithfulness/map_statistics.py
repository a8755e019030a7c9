"""Two maps compared, for the sanity checks; and one map's sparseness."""

import torch
from torch import Tensor


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two maps' pixels; equal pixels share their mean rank.

    The measure of Adebayo et al. 2018, "Sanity Checks for Saliency Maps", arXiv:1810.03292, without absolute values:
    our maps have none below zero.

    Args:
        first: (h, w).
        second: (h, w), the same size.

    Returns:
        In [-1, 1]. With a flat map it is not defined: 1 if both are flat, which is alike, and 0 if one is.

    Raises:
        ValueError: the maps differ in size.
    """
    if first.shape != second.shape:
        raise ValueError(f"second: must be {tuple(first.shape)}, not {tuple(second.shape)}")
    left, right = _centred_ranks(first), _centred_ranks(second)
    left_norm, right_norm = float(left.norm()), float(right.norm())
    if left_norm == 0 or right_norm == 0:
        return float(left_norm == right_norm)
    return max(-1.0, min(1.0, float(left @ right) / (left_norm * right_norm)))


def gini(saliency: Tensor) -> float:
    """The Gini index of a map: 0 where all pixels are equal, 1 - 1 / pixels where all but one are zero.

    Hurley and Rickard 2009, "Comparing Measures of Sparsity", doi:10.1109/TIT.2009.2027527, table I; used for maps
    by Chalasani et al. 2020, "Concise Explanations of Neural Networks using Adversarial Training", arXiv:1810.06583.

    Args:
        saliency: (h, w), not negative.

    Returns:
        In [0, 1); 0 if all pixels are zero.
    """
    ascending = saliency.flatten().double().sort().values
    total = float(ascending.sum())
    if total == 0:
        return 0.0
    count = ascending.numel()
    # The share of pixels above each pixel, which itself counts as half.
    above = (count - torch.arange(1, count + 1, dtype=torch.float64, device=ascending.device) + 0.5) / count
    return max(0.0, 1.0 - 2.0 * float(ascending @ above) / total)


def _centred_ranks(saliency: Tensor) -> Tensor:
    """Every pixel's rank less the mean rank: float64 (h * w,); all zeros if the map is flat."""
    _, group, sizes = torch.unique(saliency.flatten(), return_inverse=True, return_counts=True)
    last = sizes.cumsum(0).double()
    # Of a group of equal pixels that ends at rank n, counted from 1; the mean of all ranks is (count + 1) / 2.
    ranks = last - (sizes.double() - 1) / 2
    centred: Tensor = ranks - (saliency.numel() + 1) / 2
    return centred[group]
