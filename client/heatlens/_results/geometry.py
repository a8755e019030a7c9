"""Where a map lies on the source image. The server places maps of MAP_SIZE_SOURCE in the same way."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]

NOT_SEEN = 255
"""In a mask of the source image: the model did not look here."""

# Output rows interpolated by one matrix product: enough to amortise the call, few enough that the product
# only touches the handful of source rows below them.
_BLOCK_ROWS = 64


@dataclass(frozen=True, slots=True)
class PixelBox:
    """A rectangle in pixels of the upright source image, half open: it holds x with left <= x < right.

    The centre of pixel i lies at i + 0.5.

    Attributes:
        left: left edge, in pixels from the image's left.
        top: top edge, in pixels from the image's top.
        right: right edge, in pixels from the image's left, exclusive.
        bottom: bottom edge, in pixels from the image's top, exclusive.
    """

    left: float
    top: float
    right: float
    bottom: float


def covered_pixels(region: PixelBox, size: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of an image of `size` (width, height) that `place_map` fills; slices may be empty."""
    width_px, height_px = size
    return _covered(region.top, region.bottom, height_px), _covered(region.left, region.right, width_px)


def place_map(values: npt.ArrayLike, region: PixelBox, size: tuple[int, int]) -> Float32Array:
    """Place a map on the image that it explains: bilinear, half-pixel centres, zero outside `region`.

    With the map of shape (h, w) spread evenly over the region, the output pixel (X, Y) is

        u = (X + 0.5 - left) * w / (right - left) - 0.5,    clamped to [0, w - 1],
        v = (Y + 0.5 - top) * h / (bottom - top) - 0.5,     clamped to [0, h - 1],
        out[Y, X] = the map, bilinear at (u, v)

    where left <= X + 0.5 < right and top <= Y + 0.5 < bottom, and 0 elsewhere. A region so narrow that it lies
    between two pixel centres fills the pixel that holds its middle, with the map's middle: if no integer X has
    left <= X + 0.5 < right, then X = floor((left + right) / 2) alone is filled, with u = (w - 1) / 2, and likewise
    in y. The clamp repeats the map's edge inside the region, as resizing does in OpenCV (INTER_LINEAR) and torch
    (bilinear, align_corners=False). The region may reach beyond the image. Its edges are used as float32, as they
    travel, so that client and server place alike. Bilinear interpolation is a product with two banded matrices,
    taken in blocks: this is as exact as float32 allows, where OpenCV's warps quantise the position.

    Args:
        values: float (h, w), h >= 1, w >= 1.
        region: the part of the source image that the map covers.
        size: (width, height) of the source image, in pixels, each >= 1.

    Returns:
        float32 (height, width).

    Raises:
        ValueError: `values` is not a matrix with elements, `region` is empty or not finite, or `size` is not positive.
    """
    source = np.asarray(values, dtype=np.float32)
    if source.ndim != 2 or source.size == 0:
        raise ValueError(f"values: expected a map of shape (height, width), got shape {source.shape}")
    width_px, height_px = size
    if width_px < 1 or height_px < 1:
        raise ValueError(f"size: expected (width, height) >= 1, got {size}")
    left, top, right, bottom = (float(np.float32(e)) for e in (region.left, region.top, region.right, region.bottom))
    if not (math.isfinite(right - left) and math.isfinite(bottom - top) and left < right and top < bottom):
        raise ValueError(f"region: expected left < right and top < bottom, got {region}")
    placed = np.zeros((height_px, width_px), np.float32)
    rows, columns = _covered(top, bottom, height_px), _covered(left, right, width_px)
    if rows.start < rows.stop and columns.start < columns.stop:
        # Columns first: the intermediate is (h, W), far smaller than the output.
        wide = _interpolate_rows(source.T, columns, left, right).T
        placed[rows, columns] = _interpolate_rows(wide, rows, top, bottom)
    return placed


def place_mask(mask: UInt8Array, region: PixelBox, size: tuple[int, int]) -> UInt8Array:
    """Place a mask of a model's input on the source image: the input pixel that holds each source pixel's centre.

    Args:
        mask: uint8 (h, w).
        region: the part of the source image that the mask covers.
        size: (width, height) of the source image, in pixels.

    Returns:
        uint8 (height, width), NOT_SEEN outside `region`.
    """
    placed = np.full((size[1], size[0]), NOT_SEEN, np.uint8)
    rows, inputs_y = _held(region.top, region.bottom, mask.shape[0], size[1])
    columns, inputs_x = _held(region.left, region.right, mask.shape[1], size[0])
    placed[np.ix_(rows, columns)] = mask[np.ix_(inputs_y, inputs_x)]
    return placed


def _held(start: float, stop: float, count: int, length_px: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the pixels whose centres are in [start, stop), and which of its `count` equal parts holds each."""
    centres = np.arange(length_px) + 0.5
    inside = np.flatnonzero((centres >= start) & (centres < stop))
    parts = np.floor((centres[inside] - start) * (count / (stop - start))).astype(np.intp)
    return inside, np.minimum(parts, count - 1)


def _covered(start: float, stop: float, length_px: int) -> slice:
    """Return the pixels in [0, length_px) with start <= i + 0.5 < stop, in float32 like `place_map`.

    If there is none on the whole line, the one that holds the middle: a picture that is one pixel wide has a region
    of less than a pixel, which must not get lost between two centres.
    """
    start, stop = float(np.float32(start)), float(np.float32(stop))
    first, last = math.ceil(start - 0.5), math.ceil(stop - 0.5)
    if first == last:
        first = math.floor((start + stop) / 2)
        last = first + 1
    first = min(max(first, 0), length_px)
    return slice(first, min(max(last, first), length_px))


def _interpolate_rows(source: Float32Array, outputs: slice, start: float, stop: float) -> Float32Array:
    """Return the rows `outputs` of `source` spread over [start, stop): float32 (len(outputs), columns)."""
    count = source.shape[0]
    centres = np.arange(outputs.start, outputs.stop, dtype=np.float64) + 0.5
    if not start <= centres[0] < stop:
        # The one pixel around a region that holds no centre: it stands for the region's middle.
        centres = np.array([(start + stop) / 2])
    positions = np.clip((centres - start) * (count / (stop - start)) - 0.5, 0, count - 1)
    lower = positions.astype(np.intp)
    upper = np.minimum(lower + 1, count - 1)
    fraction = (positions - lower).astype(np.float32)
    result = np.empty((len(positions), source.shape[1]), np.float32)
    for begin in range(0, len(positions), _BLOCK_ROWS):
        block = slice(begin, begin + _BLOCK_ROWS)
        base, end = lower[block][0], upper[block][-1] + 1
        index = np.arange(len(lower[block]))
        weights = np.zeros((len(index), end - base), np.float32)
        weights[index, lower[block] - base] = 1 - fraction[block]
        weights[index, upper[block] - base] += fraction[block]
        np.matmul(weights, source[base:end], out=result[block])
    return result
