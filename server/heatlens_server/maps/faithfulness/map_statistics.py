"""Two maps compared, for the sanity checks; and one map's sparseness."""

import numpy as np
import numpy.typing as npt

from heatlens_server.maps.concrete import Array, as_numpy


def rank_correlation(first: Array, second: Array) -> float:
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
    left_norm, right_norm = float(np.linalg.norm(left)), float(np.linalg.norm(right))
    if left_norm == 0 or right_norm == 0:
        return float(left_norm == right_norm)
    return max(-1.0, min(1.0, float(left @ right) / (left_norm * right_norm)))


def gini(saliency: Array) -> float:
    """The Gini index of a map: 0 where all pixels are equal, 1 - 1 / pixels where all but one are zero.

    Hurley and Rickard 2009, "Comparing Measures of Sparsity", doi:10.1109/TIT.2009.2027527, table I; used for maps
    by Chalasani et al. 2020, "Concise Explanations of Neural Networks using Adversarial Training", arXiv:1810.06583.

    Args:
        saliency: (h, w), not negative.

    Returns:
        In [0, 1); 0 if all pixels are zero.
    """
    ascending = np.sort(as_numpy(saliency).astype(np.float64), axis=None)
    total = float(ascending.sum())
    if total == 0:
        return 0.0
    count = ascending.size
    # The share of pixels above each pixel, which itself counts as half.
    above = (count - np.arange(1, count + 1) + 0.5) / count
    return max(0.0, 1.0 - 2.0 * float(ascending @ above) / total)


def _centred_ranks(saliency: Array) -> npt.NDArray[np.float64]:
    """Every pixel's rank less the mean rank: float64 (h * w,); all zeros if the map is flat."""
    pixels = as_numpy(saliency).ravel()
    _, group, sizes = np.unique(pixels, return_inverse=True, return_counts=True)
    # Of a group of equal pixels that ends at rank n, counted from 1; the mean of all ranks is (count + 1) / 2.
    ranks = sizes.cumsum() - (sizes - 1) / 2
    centred: npt.NDArray[np.float64] = (ranks - (pixels.size + 1) / 2)[group]
    return centred
