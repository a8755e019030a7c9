"""Turning maps into colours."""

from functools import lru_cache
from numbers import Real

import cv2
import numpy as np
import numpy.typing as npt

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.geometry import PixelBox, covered_pixels

UInt8Array = npt.NDArray[np.uint8]

_PREFIX = "COLORMAP_"


@lru_cache(maxsize=1)
def colormap_names() -> tuple[str, ...]:
    """Return the names of the colour maps: those of this OpenCV, in lower case, sorted."""
    return tuple(sorted(name.removeprefix(_PREFIX).lower() for name in dir(cv2) if name.startswith(_PREFIX)))


def color_table(colormap: str) -> UInt8Array:
    """Return the colours of 0 to 255, uint8 (256, 1, 3), RGB. Do not write to it.

    Raises:
        InvalidArgumentError: OpenCV has no such colour map.
    """
    if not isinstance(colormap, str) or colormap.lower() not in colormap_names():
        raise InvalidArgumentError.of("colormap", f"expected one of {', '.join(colormap_names())}; got {colormap!r}")
    return _color_table(colormap.upper())


@lru_cache(maxsize=32)
def _color_table(name: str) -> UInt8Array:
    code = getattr(cv2, _PREFIX + name)
    ramp = np.arange(256, dtype=np.uint8).reshape(256, 1)
    return np.ascontiguousarray(cv2.applyColorMap(ramp, code)[:, :, ::-1])


def color_map(values: npt.NDArray[np.float32], colormap: str) -> UInt8Array:
    """Colour a map: float32 (h, w) in [0, 1] to uint8 (h, w, 3), RGB.

    Raises:
        InvalidArgumentError: OpenCV has no such colour map.
    """
    table = color_table(colormap)
    # convertScaleAbs rounds and saturates in one pass.
    levels = cv2.convertScaleAbs(values, alpha=255.0)
    return np.asarray(cv2.applyColorMap(levels, table), dtype=np.uint8)


def blend(
    image: UInt8Array, values: npt.NDArray[np.float32] | None, region: PixelBox, *, colormap: str, alpha: float
) -> UInt8Array:
    """Blend a placed map over its image: (1 - alpha) * image + alpha * colour inside `region`, the image outside.

    Pixels that the model did not see keep their colours: a tint would say that they were seen and did not matter.

    Args:
        image: uint8 (H, W, 3), RGB.
        values: float32 (H, W) in [0, 1]. None: no map, the image keeps its colours.
        region: what the model saw, in pixels of the image.
        colormap: name of an OpenCV colour map, in any case.
        alpha: opacity of the colours, in [0, 1].

    Returns:
        uint8 (H, W, 3), RGB, a new array.

    Raises:
        InvalidArgumentError: no such colour map, or alpha is not in [0, 1].
    """
    if not isinstance(alpha, Real) or not 0.0 <= alpha <= 1.0:
        raise InvalidArgumentError.of("alpha", f"expected a number from 0 to 1, got {alpha!r}")
    color_table(colormap)
    result = image.copy()
    if values is None:
        return result
    height_px, width_px = image.shape[:2]
    rows, columns = covered_pixels(region, (width_px, height_px))
    seen = np.ascontiguousarray(values[rows, columns])
    if seen.size:
        source = np.ascontiguousarray(image[rows, columns])
        result[rows, columns] = cv2.addWeighted(source, 1.0 - alpha, color_map(seen, colormap), alpha, 0.0)
    return result
