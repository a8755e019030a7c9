"""ROAD: what becomes of the probability when a part of the image is imputed from the rest.

Rong et al. 2022, "A Consistent and Efficient Evaluation Strategy for Attribution Methods", arXiv:2202.00449; sign and
percentiles as in `pytorch_grad_cam.metrics.road` of grad-cam 1.5.7.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.faithfulness.imputation import impute
from heatlens_server.backends.torch.faithfulness.order import places

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
"""Percent of the pixels that stay."""


def imputed(image: Tensor, saliency: Tensor, start: int, stop: int, *, most_first: bool) -> Tensor:
    """The image with all but a percentile of its pixels imputed, for each of PERCENTILES[start:stop].

    grad-cam removes all pixels that equal the threshold, which is the whole image where that is a map's many zeros, and
    has no solution then. Here equal pixels are removed in the order of their index, until so many are; for maps
    without equal pixels that is the same.

    Args:
        image: (C, H, W), normalised.
        saliency: (H, W), at least two pixels.
        start: the first percentile's index.
        stop: after the last one's.
        most_first: whether the most salient pixels go (MoRF), not the least salient ones (LeRF).

    Returns:
        (stop - start, C, H, W), in float32 or wider.
    """
    pixels = saliency.numel()
    # As many as are below the percentile, which numpy interpolates between pixels (pixels - 1) * percent / 100.
    kept = [math.ceil((pixels - 1) * percent / 100) for percent in PERCENTILES[start:stop]]
    removed = pixels - torch.tensor(kept, device=saliency.device).reshape(-1, 1, 1)
    return impute(image, places(saliency, most_first=most_first) < removed)


def mean_change(probabilities: Sequence[float], original: float) -> float:
    """The mean of what imputing changes, in [-1, 1]; negative if the probability drops.

    Args:
        probabilities: of the imputed images.
        original: of the image itself.
    """
    return math.fsum(probabilities) / len(probabilities) - original
