"""From the bytes of a request to uint8 RGB pixels. Everything here reads untrusted input."""

import io
import math
import warnings
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from heatlens_server.core.arrays import UInt8Array
from heatlens_server.core.errors import InvalidArgument

_FORMATS = ("JPEG", "PNG", "WEBP")
# OpenCV refuses longer sides (CV_IO_MAX_IMAGE_WIDTH, CV_IO_MAX_IMAGE_HEIGHT).
_MAX_SIDE_PX = 1 << 20
_CHANNELS = 3
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# Beyond its limit Pillow warns first and raises only at twice the limit. As an error the warning becomes a refusal.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_image(encoded: bytes, *, max_pixels: int, field: str = "image.encoded") -> UInt8Array:
    """Decode a JPEG, PNG or WebP file to upright RGB.

    The EXIF orientation is applied, an alpha channel is dropped (colours are not blended with a background), gray,
    palette and CMYK become RGB, and 16-bit samples keep their upper 8 bits. Of an animation the first frame is
    read. The size is taken from the header and checked before any pixel is decoded. A truncated file is refused,
    never padded: OpenCV refuses JPEG and WebP itself; a PNG's chunks and their checksums are read first, which
    costs about 2 % of decoding it and keeps libpng from printing to stderr.

    Args:
        encoded: the file's bytes.
        max_pixels: largest accepted width times height.
        field: the name of `encoded` in errors.

    Returns:
        uint8 (height, width, 3).

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE or IMAGE_TOO_LARGE, at `field`.
    """
    if not encoded:
        raise _undecodable(field, "the image is empty")
    size = _checked_size(encoded, max_pixels, field)
    try:
        pixels = cv2.imdecode(np.frombuffer(_without_png_profile(encoded), np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise _undecodable(field, "the image is corrupt") from error
    # A file that two decoders read differently is a trick; the limit was checked on one reading only.
    if pixels is None or sorted(pixels.shape[:2]) != sorted(size):
        raise _undecodable(field, "the image is truncated or corrupt")
    return pixels.astype(np.uint8, copy=False)


def _without_png_profile(encoded: bytes) -> bytes:
    """Leave out a PNG's colour profile, which OpenCV does not use and about which libpng prints to stderr.

    Chunks: 4 bytes of length, 4 of type, data, 4 of checksum (PNG specification, 5.3); a profile precedes the pixels.
    """
    if not encoded.startswith(_PNG_SIGNATURE):
        return encoded
    start = len(_PNG_SIGNATURE)
    while start + 8 <= len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        kind = encoded[start + 4 : start + 8]
        if kind == b"iCCP":
            return encoded[:start] + encoded[end:]
        if kind == b"IDAT":
            break
        start = end
    return encoded


def pixels_from_tensor(
    *, data_type: str, shape: Sequence[int], data: bytes, max_pixels: int, field: str = "image.pixels"
) -> UInt8Array:
    """View a request's raw pixels as an image, without copying.

    Args:
        data_type: the element type's name without its prefix: "UINT8" is the only one accepted.
        shape: (height, width, 3), each side >= 1.
        data: exactly height * width * 3 bytes, row-major.
        max_pixels: largest accepted width times height.
        field: the tensor's name in errors.

    Returns:
        uint8 (height, width, 3), read-only.

    Raises:
        InvalidArgument: TENSOR_TYPE_UNSUPPORTED, TENSOR_SIZE_MISMATCH or IMAGE_TOO_LARGE, at the wrong field.
    """
    if data_type != "UINT8":
        raise InvalidArgument.of(
            f"{field}.data_type", f"must be UINT8, got {data_type}", reason="TENSOR_TYPE_UNSUPPORTED"
        )
    sides = [int(side) for side in shape]
    if len(sides) != 3 or sides[2] != _CHANNELS or min(sides) < 1:
        # A hostile shape can be long; the message need not be.
        shown = f"{sides}" if len(sides) <= 8 else f"{len(sides)} dimensions"
        raise InvalidArgument.of(
            f"{field}.shape",
            f"must be (height, width, 3) with sides >= 1, got {shown}",
            reason="TENSOR_SIZE_MISMATCH",
        )
    _check_pixels(sides[1], sides[0], max_pixels, field=f"{field}.shape")
    # Python's integers do not overflow.
    expected_bytes = math.prod(sides)
    if len(data) != expected_bytes:
        raise InvalidArgument.of(
            f"{field}.data",
            f"shape {sides} needs {expected_bytes} bytes, got {len(data)}",
            reason="TENSOR_SIZE_MISMATCH",
            expected_bytes=expected_bytes,
            actual_bytes=len(data),
        )
    return np.frombuffer(data, np.uint8).reshape(sides)


def _checked_size(encoded: bytes, max_pixels: int, field: str) -> tuple[int, int]:
    """Return (width, height) from the header, once it is acceptable. Checks a PNG's chunks."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width_px, height_px = image.size
            _check_pixels(width_px, height_px, max_pixels, field=field)
            if image.format == "PNG":
                image.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidArgument.of(
            field,
            f"the image has more than the {max_pixels} pixels accepted",
            reason="IMAGE_TOO_LARGE",
            max_pixels=max_pixels,
        ) from error
    except InvalidArgument:
        raise
    except UnidentifiedImageError as error:
        raise _undecodable(field, "not a JPEG, PNG or WebP image") from error
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception as error:
        raise _undecodable(field, "the image is truncated or corrupt") from error
    return width_px, height_px


def _check_pixels(width_px: int, height_px: int, max_pixels: int, *, field: str) -> None:
    if width_px * height_px > max_pixels or max(width_px, height_px) > _MAX_SIDE_PX:
        raise InvalidArgument.of(
            field,
            f"{width_px}x{height_px} pixels; at most {max_pixels} are accepted, and {_MAX_SIDE_PX} per side",
            reason="IMAGE_TOO_LARGE",
            max_pixels=max_pixels,
            width_px=width_px,
            height_px=height_px,
        )


def _undecodable(field: str, description: str) -> InvalidArgument:
    return InvalidArgument.of(field, description, reason="IMAGE_UNDECODABLE")
