"""Masks and vectors that come with requests. Everything here reads untrusted input."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from heatlens_server.core.arrays import BoolArray, Float32Array, UInt8Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import FittedImage

OUTSIDE = 255
"""In a predicted mask of the source image: the model did not look here."""


def mask_from_tensor(*, data_type: str, shape: Sequence[int], data: bytes, max_pixels: int) -> BoolArray:
    """Read a request's mask: which pixels of the upright source image are meant.

    Args:
        data_type: the element type's name without its prefix: "UINT8" is the only one accepted.
        shape: (height, width), each side >= 1.
        data: exactly height * width bytes, row-major; those other than 0 are meant.
        max_pixels: largest accepted width times height.

    Returns:
        bool (height, width).

    Raises:
        InvalidArgument: TENSOR_TYPE_UNSUPPORTED, TENSOR_SIZE_MISMATCH or IMAGE_TOO_LARGE, at the wrong field.
    """
    _check(
        "mask",
        data_type=data_type,
        shape=shape,
        data=data,
        wanted_type="UINT8",
        item_bytes=1,
        dimensions=("height", "width"),
        max_items=max_pixels,
    )
    mask: BoolArray = np.frombuffer(data, np.uint8).reshape([int(side) for side in shape]) != 0
    return mask


def vector_from_tensor(*, data_type: str, shape: Sequence[int], data: bytes, length: int) -> Float32Array:
    """Read a request's embedding.

    Args:
        data_type: the element type's name without its prefix: "FLOAT32" is the only one accepted.
        shape: (length,), or (1, length), as a batch of one.
        data: exactly 4 * length bytes, little-endian, finite and not all zero.
        length: of the model's embeddings.

    Returns:
        float32 (length,).

    Raises:
        InvalidArgument: TENSOR_TYPE_UNSUPPORTED, TENSOR_SIZE_MISMATCH or INVALID_OPTION, at the wrong field.
    """
    if len(shape) == 2 and shape[0] == 1:
        shape = shape[1:]
    _check(
        "reference_embedding",
        data_type=data_type,
        shape=shape,
        data=data,
        wanted_type="FLOAT32",
        item_bytes=4,
        dimensions=("length",),
        max_items=max(length, 1),
    )
    vector = np.frombuffer(data, "<f4").astype(np.float32)
    if len(vector) != length:
        raise InvalidArgument.of(
            "reference_embedding.shape",
            f"the model's embeddings have {length} elements, got {len(vector)}",
            reason="TENSOR_SIZE_MISMATCH",
        )
    if not np.isfinite(vector).all() or not vector.any():
        raise InvalidArgument.of("reference_embedding.data", "must be finite and not all zero", reason="INVALID_OPTION")
    return vector


def fit_mask(mask: BoolArray, image: FittedImage) -> BoolArray:
    """Bring a mask of the source image to the model's input.

    Along a side that is shrunk, an input pixel is in the mask if any source pixel is whose centre it holds, so that
    nothing that the model sees is lost, however thin. Otherwise it is if the source pixel at its own centre is.

    Args:
        mask: bool (source height, source width).
        image: how the source image was fitted.

    Returns:
        bool (H, W), of the shape of `image.pixels`, at least one True.

    Raises:
        InvalidArgument: MASK_SIZE_MISMATCH if the mask is not of the source image's size; MASK_EMPTY if none of its
            pixels is within what the model sees.
    """
    source = (image.source_height_px, image.source_width_px)
    if mask.shape != source:
        raise InvalidArgument.of(
            "mask.shape",
            f"must be that of the upright image, {source[0]}x{source[1]} (height x width); got "
            f"{mask.shape[0]}x{mask.shape[1]}",
            reason="MASK_SIZE_MISMATCH",
        )
    height_px, width_px = image.pixels.shape[:2]
    region = image.region
    seen = _fit_rows(mask, region.top, region.bottom, height_px)
    fitted = np.ascontiguousarray(_fit_rows(seen.T, region.left, region.right, width_px).T)
    if not fitted.any():
        raise InvalidArgument.of(
            "mask.data", "no pixel of the mask is within the part of the image that the model sees", reason="MASK_EMPTY"
        )
    return fitted


def place_mask(mask: UInt8Array, image: FittedImage) -> UInt8Array:
    """Bring a mask of the model's input to the source image: the input pixel that holds each source pixel's centre.

    Args:
        mask: uint8 (H, W), of the shape of `image.pixels`.
        image: how the source image was fitted.

    Returns:
        uint8 (source height, source width); OUTSIDE where the model did not look.
    """
    region = image.region
    placed = np.full((image.source_height_px, image.source_width_px), OUTSIDE, np.uint8)
    rows, inputs_y = _held(region.top, region.bottom, mask.shape[0], image.source_height_px)
    columns, inputs_x = _held(region.left, region.right, mask.shape[1], image.source_width_px)
    placed[np.ix_(rows, columns)] = mask[np.ix_(inputs_y, inputs_x)]
    return placed


def _held(start: float, stop: float, count: int, length_px: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The source indices whose centres are in [start, stop), and which of its `count` equal parts holds each."""
    centres = np.arange(length_px) + 0.5
    inside = np.flatnonzero((centres >= start) & (centres < stop))
    parts = np.floor((centres[inside] - start) * (count / (stop - start))).astype(np.intp)
    return inside, np.minimum(parts, count - 1)


def _fit_rows(mask: BoolArray, start: float, stop: float, count: int) -> BoolArray:
    """What `count` equal parts of the rows [start, stop) hold of a mask, as `fit_mask` has it."""
    step = (stop - start) / count
    length_px = len(mask)
    middles = start + (np.arange(count, dtype=np.float64) + 0.5) * step
    # Beyond the image, as where it is in a letterbox, there is nothing.
    beyond = (middles < 0) | (middles >= length_px)
    if step <= 1.0:
        found = mask[np.clip(np.floor(middles), 0, length_px - 1).astype(np.intp)]
        found[beyond] = False
        return found
    # The first row whose centre each part holds, and the first one after the last part. A part is wider than a row, so
    # that none is empty; should rounding say otherwise, it has the row at its edge.
    edges = np.clip(np.ceil(start + np.arange(count + 1) * step - 0.5), 0, length_px).astype(np.intp)
    firsts = np.minimum(edges[:-1], length_px - 1)
    ends = np.maximum(edges[1:], firsts + 1)
    # 30 times as fast as `np.logical_or.reduceat`.
    found = np.stack([mask[first:end].any(axis=0) for first, end in zip(firsts, ends, strict=True)])
    found[beyond & (edges[:-1] == edges[1:])] = False
    return found


def _check(
    field: str,
    *,
    data_type: str,
    shape: Sequence[int],
    data: bytes,
    wanted_type: str,
    item_bytes: int,
    dimensions: tuple[str, ...],
    max_items: int,
) -> None:
    if data_type != wanted_type:
        raise InvalidArgument.of(
            f"{field}.data_type", f"must be {wanted_type}, got {data_type}", reason="TENSOR_TYPE_UNSUPPORTED"
        )
    sides = [int(side) for side in shape]
    if len(sides) != len(dimensions) or min(sides) < 1:
        # A hostile shape can be long; the message need not be.
        found = f"{sides}" if len(sides) <= 8 else f"{len(sides)} dimensions"
        raise InvalidArgument.of(
            f"{field}.shape",
            f"must be ({', '.join(dimensions)}) with sides >= 1, got {found}",
            reason="TENSOR_SIZE_MISMATCH",
        )
    # Python's integers do not overflow.
    items = math.prod(sides)
    if items > max_items:
        raise InvalidArgument.of(
            f"{field}.shape",
            f"{sides} has {items} elements; at most {max_items} are accepted",
            reason="IMAGE_TOO_LARGE",
        )
    if len(data) != items * item_bytes:
        raise InvalidArgument.of(
            f"{field}.data",
            f"shape {sides} needs {items * item_bytes} bytes, got {len(data)}",
            reason="TENSOR_SIZE_MISMATCH",
            expected_bytes=items * item_bytes,
            actual_bytes=len(data),
        )
