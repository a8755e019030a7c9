"""Arrays of numbers, torch's or numpy's: what the arrays that graphs are written with lack, and need not have."""

from typing import Any

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace, device, to_device

Array = Any
"""An array of numbers, torch's or numpy's: it can be indexed by arrays, and written to."""


def as_numpy(x: Array) -> npt.NDArray[Any]:
    """An array on the host; on the CPU it shares its memory."""
    return np.asarray(to_device(x, "cpu"))


def upsample(maps: Array, size: tuple[int, int]) -> Array:
    """Resize maps bilinearly with half-pixel centres (align_corners=False), as OpenCV's INTER_LINEAR does.

    Every output is a weighted mean of inputs whose weights sum to 1. So values stay within the input's range, and
    min-max before and after upsampling gives the same map as after alone. ReLU does not have this property: apply it
    first. No antialiasing, so this is for growing maps; shrinking is allowed and skips pixels.

    Args:
        maps: (N, K, h, w) floating point; half precision is interpolated in half precision.
        size: (height, width) wanted, each >= 1.

    Returns:
        (N, K, height, width), same dtype and device; `maps` itself if it has that size already.

    Raises:
        ValueError: maps is not 4-D, or the size is not positive.
    """
    if maps.ndim != 4:
        raise ValueError(f"maps: must be (N, K, h, w), not {tuple(maps.shape)}")
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"size: must be positive, not {height}x{width}")
    if maps.shape[-2] == height and maps.shape[-1] == width:
        return maps
    xp = array_namespace(maps)
    # Torch has an operator for it, and so have the graphs that torch writes.
    own = getattr(xp, "nn", None)
    if own is not None:
        return own.functional.interpolate(maps, size=(height, width), mode="bilinear", align_corners=False)
    down, across = (
        xp.asarray(_interpolation(given, wanted), dtype=maps.dtype, device=device(maps))
        for given, wanted in zip(maps.shape[-2:], size, strict=True)
    )
    return down @ (maps @ xp.matrix_transpose(across))


def _interpolation(given: int, wanted: int) -> npt.NDArray[np.float64]:
    """What makes `wanted` numbers in a row of `given` ones: (wanted, given), at most two numbers of a row not zero."""
    places = np.clip((np.arange(wanted) + 0.5) * given / wanted - 0.5, 0, given - 1)
    return np.maximum(0.0, 1.0 - np.abs(places[:, None] - np.arange(given)))
