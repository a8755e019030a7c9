"""Images changed in the order in which a map says pixels matter: deletion, insertion, and ROAD.

Deletion and insertion: Petsiuk, Das and Saenko 2018, "RISE: Randomized Input Sampling for Explanation of Black-box
Models", arXiv:1806.07421, section 4, with the baselines of the authors' code (github.com/eclique/RISE, evaluation.py).

ROAD, where a part of the image is imputed from the rest: Rong et al. 2022, "A Consistent and Efficient Evaluation
Strategy for Attribution Methods", arXiv:2202.00449; sign and percentiles as in `pytorch_grad_cam.metrics.road` of
grad-cam 1.5.7.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device

from heatlens_server.maps.concrete import Array
from heatlens_server.maps.faithfulness.imputation import impute
from heatlens_server.maps.precision import at_least_float32


def places(saliency: Array, *, most_first: bool = True) -> Array:
    """Every pixel's place in the order of saliency; equal pixels are in the order of their index, row by row.

    So the order of every map, a flat one included, is defined and the same on every device. The first n pixels are
    `places(saliency) < n`.

    Args:
        saliency: (h, w) floating point.
        most_first: whether place 0 is the most salient pixel's, not the least salient one's.

    Returns:
        int64 (h, w), each of 0 ... h * w - 1 once.
    """
    xp = array_namespace(saliency)
    order = xp.argsort(xp.reshape(saliency, (-1,)), descending=most_first, stable=True)
    found = xp.empty_like(order)
    found[order] = xp.arange(len(order), device=device(order))
    return xp.reshape(found, saliency.shape)


STEPS = 28
"""Steps from nothing changed to everything changed. The authors use one per row of pixels; the area hardly differs."""

_BLUR_SIZE = 11
_BLUR_SIGMA = 5.0


def deleted(image: Array, saliency: Array, start: int, stop: int) -> Array:
    """The image without its k / STEPS most salient pixels, for each k in [start, stop): they are 0.

    Zero in a normalised image is the mean colour of the data that the model was trained on.

    Args:
        image: (C, H, W), normalised.
        saliency: (H, W).
        start: the first k, in [0, STEPS].
        stop: after the last k, at most STEPS + 1.

    Returns:
        (stop - start, C, H, W).
    """
    return array_namespace(image).where(_first(saliency, start, stop), 0.0, image)


def inserted(image: Array, saliency: Array, start: int, stop: int) -> Array:
    """A blurred image with the k / STEPS most salient pixels as they were, for each k in [start, stop).

    Args:
        image: (C, H, W), normalised.
        saliency: (H, W).
        start: the first k, in [0, STEPS].
        stop: after the last k, at most STEPS + 1.

    Returns:
        (stop - start, C, H, W).
    """
    return array_namespace(image).where(_first(saliency, start, stop), image, blurred(image))


def blurred(image: Array) -> Array:
    """The image blurred as in the authors' code: an 11 x 11 kernel of sigma 5, zeros around the image. (C, H, W)."""
    xp = array_namespace(image)
    planes = at_least_float32(image)
    down, across = (
        xp.asarray(_blur_matrix(length), dtype=planes.dtype, device=device(image)) for length in image.shape[1:]
    )
    return xp.astype(down @ (planes @ across), image.dtype)


def area(probabilities: Sequence[float]) -> float:
    """Area under a curve of evenly spaced points over [0, 1], by the trapezoidal rule.

    Args:
        probabilities: at least two.
    """
    ends = (probabilities[0] + probabilities[-1]) / 2
    return (ends + math.fsum(probabilities[1:-1])) / (len(probabilities) - 1)


def _first(saliency: Array, start: int, stop: int) -> Array:
    """Which pixels are among the k / STEPS most salient ones: bool (stop - start, 1, H, W)."""
    height, width = saliency.shape
    counts = array_namespace(saliency).arange(start, stop, device=device(saliency)) * (height * width) // STEPS
    return (places(saliency) < counts[:, None, None])[:, None]


def _blur_matrix(length: int) -> npt.NDArray[np.float64]:
    """What blurs a row of so many pixels: (length, length), symmetric; outside is nothing."""
    offsets = np.arange(length) - np.arange(length)[:, None]
    near = np.abs(offsets) <= _BLUR_SIZE // 2
    return np.where(near, np.array(_blur_kernel())[np.where(near, offsets, 0) + _BLUR_SIZE // 2], 0.0)


def _blur_kernel() -> list[float]:
    """One axis of the authors' kernel; sums to 1.

    They filter a single 1 in an 11 x 11 image with scipy's `gaussian_filter`, which mirrors the image at its borders
    and cuts the Gaussian at 4 sigma. What would lie outside is so folded back inside.
    """
    radius = round(4 * _BLUR_SIGMA)
    weights = {offset: math.exp(-0.5 * (offset / _BLUR_SIGMA) ** 2) for offset in range(-radius, radius + 1)}
    total = math.fsum(weights.values())
    kernel = [0.0] * _BLUR_SIZE
    for place in range(_BLUR_SIZE):
        for offset, weight in weights.items():
            mirrored = (place + offset) % (2 * _BLUR_SIZE)
            if min(mirrored, 2 * _BLUR_SIZE - 1 - mirrored) == _BLUR_SIZE // 2:
                kernel[place] += weight / total
    return kernel


PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
"""Percent of the pixels that stay."""


def imputed(image: Array, saliency: Array, start: int, stop: int, *, most_first: bool) -> Array:
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
    pixels = saliency.shape[0] * saliency.shape[1]
    # As many as are below the percentile, which numpy interpolates between pixels (pixels - 1) * percent / 100.
    kept = [math.ceil((pixels - 1) * percent / 100) for percent in PERCENTILES[start:stop]]
    removed = pixels - array_namespace(saliency).asarray(kept, device=device(saliency))
    return impute(image, places(saliency, most_first=most_first) < removed[:, None, None])


def mean_change(probabilities: Sequence[float], original: float) -> float:
    """The mean of what imputing changes, in [-1, 1]; negative if the probability drops.

    Args:
        probabilities: of the imputed images.
        original: of the image itself.
    """
    return math.fsum(probabilities) / len(probabilities) - original
