"""TIFF files: of 8 bits by Pillow, of more bits or channels by tifffile. Everything here reads untrusted input."""

import io
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.levels import SourcePixels, wrong_channels
from heatlens_server.imaging.limits import check_size, undecodable
from heatlens_server.imaging.orientation import ORIENTATION, upright

if TYPE_CHECKING:
    from tifffile import TiffFile

_GRAY, _RGB, _RGBA = 1, 3, 4
_COLORS = frozenset({_GRAY, _RGB, _RGBA})
_BYTE_BITS = 8
_MOST_SAMPLES = 64

_UNCOMPRESSED = 1
_MAX_SAMPLE_VALUE = 281
# Values of ExtraSamples and of PhotometricInterpretation (TIFF 6.0).
_ALPHA = frozenset({1, 2})
_WHITE_IS_ZERO, _RGB_COLORS = 0, 2

# It logs what it finds odd in files.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


def decode_tiff(encoded: bytes, *, channels: int, max_pixels: int, field: str) -> SourcePixels:
    """Decode the first page of a TIFF file, upright; for a model of other channels, as many pages of one channel.

    Compressed files of more than 8 bits are read by OpenCV, as zlib in Python would unpack whatever a file holds.

    Args:
        encoded: the file's bytes.
        channels: of the model's input.
        max_pixels: largest accepted width times height.
        field: the name of `encoded` in errors.

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE, IMAGE_TOO_LARGE or IMAGE_CHANNELS_MISMATCH, at `field`.
    """
    from tifffile import TiffFile  # noqa: PLC0415 - most servers see no such file

    try:
        with TiffFile(io.BytesIO(encoded)) as file:
            page: Any = file.pages[0]
            _check_page(page, encoded, max_pixels, field)
            if page.samplesperpixel == 1 and channels not in _COLORS:
                return _stacked(file, channels, encoded, max_pixels, field)
            if _deepest(page) <= _BYTE_BITS and (page.samplesperpixel in _COLORS or channels in _COLORS):
                return SourcePixels(_by_pillow(encoded, page, channels, field), field=field, highest=255.0)
            return _deep(encoded, page, channels, field)
    except (InvalidArgument, MemoryError):
        raise
    # Parsers raise whatever their struct and index operations raise on garbage.
    except Exception as error:
        raise undecodable(field, "the TIFF file is truncated, corrupt or of a kind that is not read") from error


def _check_page(page: Any, encoded: bytes, max_pixels: int, field: str) -> None:  # noqa: ANN401 - tifffile's
    """Check a page's size, and that the file holds all of it."""
    check_size(page.imagewidth, page.imagelength, max_pixels, field=field)
    if page.imagedepth != 1 or page.imagewidth < 1 or page.imagelength < 1 or page.dtype is None:
        raise undecodable(field, "the TIFF file holds no plain image")
    if page.samplesperpixel > _MOST_SAMPLES:
        raise undecodable(field, f"the TIFF file has {page.samplesperpixel} channels")
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    whole = all(start > 0 and count > 0 and start + count <= len(encoded) for start, count in parts)
    held = sum(count for _, count in parts)
    if not parts or not whole or (page.compression == _UNCOMPRESSED and held < page.nbytes):
        raise undecodable(field, "the TIFF file is truncated")


def _deepest(page: Any) -> int:  # noqa: ANN401 - tifffile's
    """The most bits of a sample."""
    bits = page.bitspersample
    return max(bits) if isinstance(bits, tuple) else int(bits)


def _by_pillow(encoded: bytes, page: Any, channels: int, field: str) -> npt.NDArray[np.uint8]:  # noqa: ANN401
    with Image.open(io.BytesIO(encoded), formats=("TIFF",)) as image:
        # Pillow turns TIFF files upright by itself.
        mode = "RGBA" if channels == _RGBA and image.has_transparency_data else "RGB"
        values = np.asarray(image.convert(mode))
    if sorted(values.shape[:2]) != sorted((page.imagelength, page.imagewidth)):
        raise undecodable(field, "the TIFF file is corrupt")
    return values


def _deep(encoded: bytes, page: Any, channels: int, field: str) -> SourcePixels:  # noqa: ANN401 - tifffile's
    if page.compression == _UNCOMPRESSED:
        values = _samples_last(page.asarray(), page)
        if page.photometric == _WHITE_IS_ZERO:
            values = np.iinfo(values.dtype).max - values if values.dtype.kind == "u" else -values
    else:
        values = _by_opencv(encoded, page, field)
    alpha = not _ALPHA.isdisjoint(page.extrasamples)
    is_colored = page.photometric == _RGB_COLORS
    if values.shape[2] == channels + 1 and alpha and channels in {_GRAY, _RGB}:
        values = values[:, :, :channels]
    elif values.shape[2] == _RGBA and channels in {_GRAY, _RGB} and not (is_colored and alpha):
        # Four bands are no colours with an alpha channel.
        raise wrong_channels(field, channels, values.shape[2])
    return _source(upright(values, _value_of(page, ORIENTATION, 1)), page, field)


def _by_opencv(encoded: bytes, page: Any, field: str) -> npt.NDArray[Any]:  # noqa: ANN401 - tifffile's
    if page.samplesperpixel not in _COLORS or page.photometric == _WHITE_IS_ZERO:
        raise undecodable(field, "compressed TIFF files of this kind are not read: save it without compression")
    values = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if (
        values is None
        or values.dtype != page.dtype
        or values.size != page.imagelength * page.imagewidth * (page.samplesperpixel)
    ):
        raise undecodable(field, "the TIFF file is corrupt, or of a compression that is not read")
    values = values.reshape(page.imagelength, page.imagewidth, page.samplesperpixel)
    order = {_RGB: [2, 1, 0], _RGBA: [2, 1, 0, 3]}.get(page.samplesperpixel)
    return values if order is None else values[:, :, order]


def _stacked(file: "TiffFile", count: int, encoded: bytes, max_pixels: int, field: str) -> SourcePixels:
    """The first pages, of one channel each, as the channels of one image."""
    pages: list[Any] = []
    while len(pages) < count:
        try:
            pages.append(file.pages[len(pages)])
        except IndexError:
            raise wrong_channels(field, count, len(pages)) from None
    first = pages[0]
    for page in pages:
        if (page.shape, page.dtype, page.compression) != (first.shape, first.dtype, _UNCOMPRESSED):
            raise undecodable(field, "the pages of the TIFF file differ in size or type, or are compressed")
        _check_page(page, encoded, max_pixels, field)
    values = np.concatenate([_samples_last(page.asarray(), page) for page in pages], axis=2)
    return _source(upright(values, _value_of(first, ORIENTATION, 1)), first, field)


def _samples_last(values: npt.NDArray[Any], page: Any) -> npt.NDArray[Any]:  # noqa: ANN401 - tifffile's
    """A page as (H, W, S), whether its samples lie together or apart."""
    if values.ndim == 2:
        return values[:, :, None]
    return np.moveaxis(values, 0, 2) if page.axes.startswith("S") else values


def _source(values: npt.NDArray[Any], page: Any, field: str) -> SourcePixels:  # noqa: ANN401 - tifffile's
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if values.dtype == np.uint8:
        return SourcePixels(values, field=field, highest=255.0)
    if values.dtype == np.uint16:
        most = _value_of(page, _MAX_SAMPLE_VALUE, 65_535)
        known = 255 < most < 65_535 and int(values.max()) <= most
        return SourcePixels(values, field=field, highest=float(most) if known else 65_535.0)
    return SourcePixels(values, field=field, highest=1.0 if values.dtype.kind == "f" else None)


def _value_of(page: Any, code: int, default: int) -> int:  # noqa: ANN401 - tifffile's
    tag = page.tags.get(code)
    value = None if tag is None else tag.value
    if isinstance(value, Sequence) and value:
        value = value[0]
    return int(value) if isinstance(value, int) else default
