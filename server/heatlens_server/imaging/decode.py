"""From the bytes of a request to pixels. Everything here reads untrusted input."""

import dataclasses
import functools
import importlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from heatlens_server.imaging.dicom import decode_dicom
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import (
    TRUNCATED,
    Malformed,
    TooComplex,
    check_size,
    check_work,
    too_complex,
    undecodable,
)
from heatlens_server.imaging.orientation import upright
from heatlens_server.imaging.tiff import decode_tiff
from heatlens_server.imaging.walk import bitmaps, chunks, dicom, heif, jpeg, tiff
from heatlens_server.imaging.walk.plain import PlainFile, SizeCheck


def _formats_of_pillow() -> tuple[str, ...]:
    """The further formats that this installation of Pillow reads, and HEIC where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif  # noqa: PLC0415 - nothing needs it but files of this format

        pillow_heif.register_heif_opener()
    # Pillow has forty of them, which take as long to import as numpy.
    for plugin in ("Avif", "Bmp", "Gif", "Png", "Tiff", "WebP"):
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in ("BMP", "GIF", "AVIF", "HEIF") if name in Image.OPEN)


_FORMATS = ("PNG", "WEBP", *_formats_of_pillow())
_GRAY, _RGB, _RGBA = 1, 3, 4
_ALWAYS_OPAQUE = frozenset({"JPEG", "BMP-RLE"})
# In HEIC's header: the type of its first box, and the brands of it that stand for HEIC.
_HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")
# Those that OpenCV reads fastest, or at all; Pillow reads the others.
_BY_OPENCV = frozenset({"JPEG", "PNG", "WEBP", "BMP-RLE"})

# OpenCV logs what is wrong with a file to stderr; the caller is told.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Every size is checked against the server's own limit before a pixel is decoded.
Image.MAX_IMAGE_PIXELS = None


def decode_image(
    encoded: bytes, *, max_pixels: int, channels: int = _RGB, field: str = "image.encoded"
) -> SourcePixels:
    """Walk over an image file and decode it: `inspect_image`, then `decode_plain`, with their arguments and errors."""
    file = inspect_image(encoded, max_pixels=max_pixels, channels=channels, field=field)
    return decode_plain(file, max_pixels=max_pixels, channels=channels, field=field)


def inspect_image(encoded: bytes, *, max_pixels: int, channels: int = _RGB, field: str = "image.encoded") -> PlainFile:
    """Find what a file is and what decoding it will cost, and leave out of it what decoders need not see.

    Takes at most some 20 ms for 16 MiB of most formats, a third of a second for strips of JPEG in TIFF, and unpacks
    nothing.

    Args:
        encoded: the file's bytes.
        max_pixels: largest accepted width times height.
        channels: of the model's input.
        field: the name of `encoded` in errors.

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE, IMAGE_TOO_LARGE or IMAGE_TOO_COMPLEX, at `field`.
    """
    if not encoded:
        raise undecodable(field, "the image is empty")
    try:
        file = _walk(encoded, channels, functools.partial(check_size, max_pixels=max_pixels, field=field))
        check_work(file.samples, max_pixels)
    except Malformed as error:
        raise undecodable(field, str(error)) from error
    except TooComplex as error:
        raise too_complex(field, error) from error
    if min(file.width_px, file.height_px) < 1:
        raise undecodable(field, TRUNCATED)
    return file


def decode_plain(
    file: PlainFile, *, max_pixels: int, channels: int = _RGB, field: str = "image.encoded"
) -> SourcePixels:
    """Decode an image file, upright: JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, and HEIC and DICOM where they can be read.

    The EXIF orientation is applied; gray, palette and CMYK become RGB; an alpha channel is dropped (colours are not
    blended with a background) unless the model takes four channels. 16-bit PNG files keep their 16 bits; TIFF and
    DICOM: see `decode_tiff` and `decode_dicom`. Of an animation the first frame is read. A truncated file is refused,
    never padded: OpenCV refuses JPEG and WebP itself, and a PNG's checksums were read by the walk.

    Args:
        file: from `inspect_image`, of the same arguments.
        max_pixels: largest accepted width times height.
        channels: of the model's input.
        field: the name of the file in errors.

    Returns:
        The image; RGB, or RGBA if the model takes four channels and the file has an alpha channel.

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE or IMAGE_TOO_LARGE, at `field`.
        MemoryError: there is too little memory for it.
    """
    _check_memory(file)
    if file.file_format == "TIFF":
        return decode_tiff(file.encoded, channels=channels, max_pixels=max_pixels, field=field)
    if file.file_format == "DICOM":
        return decode_dicom(file.encoded, max_pixels=max_pixels, field=field)
    has_alpha = channels == _RGBA and file.file_format not in _ALWAYS_OPAQUE
    values = _with_alpha(file) if has_alpha else None
    if values is None:
        values = _colors(file) if file.file_format in _BY_OPENCV else _by_pillow(file.encoded, "RGB")
    if values is None:
        _check_memory(file)
    # A file that two readers read differently is a trick; the limit was checked on one reading only.
    if values is None or sorted(values.shape[:2]) != sorted((file.height_px, file.width_px)):
        raise undecodable(field, TRUNCATED)
    values = upright(values, file.orientation)
    if values.dtype == np.uint8:
        return SourcePixels(values, field=field, highest=255.0)
    highest, notes = _range_of_png(file, values)
    return SourcePixels(values, field=field, highest=highest, warnings=notes)


def _check_memory(file: PlainFile) -> None:
    """Raise MemoryError if there is too little for a file now: decoders do not tell that from a broken file."""
    np.empty(file.decoded_bytes, np.uint8)


def _walk(encoded: bytes, channels: int, check: SizeCheck) -> PlainFile:
    if encoded.startswith(tiff.SIGNATURES):
        return tiff.walk_tiff(encoded, check, pages=1 if channels in {_GRAY, _RGB, _RGBA} else channels)
    for is_its, walk in _WALKS:
        if is_its(encoded):
            return walk(encoded, check)
    if encoded[4:12] in _HEIC_BRANDS and "HEIF" not in _FORMATS:
        raise Malformed("a HEIC file, which this server does not read: install heatlens with the extra heic")
    if not heif.is_heif(encoded):
        raise Malformed("not a JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, HEIC or DICOM image")
    file = heif.walk_heif(encoded, check)
    # Decoders crop, and turn, as the file says.
    width_px, height_px = _size_by_pillow(file.encoded)
    check(width_px, height_px)
    return dataclasses.replace(file, width_px=width_px, height_px=height_px)


_WALKS: tuple[tuple[Callable[[bytes], bool], Callable[[bytes, SizeCheck], PlainFile]], ...] = (
    (jpeg.is_jpeg, jpeg.walk_jpeg),
    (chunks.is_png, chunks.walk_png),
    (chunks.is_webp, chunks.walk_webp),
    (dicom.is_dicom, dicom.walk_dicom),
    (bitmaps.is_gif, bitmaps.walk_gif),
    (bitmaps.is_bmp, bitmaps.walk_bmp),
)


def _size_by_pillow(encoded: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            return image.size
    # Pillow's parsers raise whatever their struct and index operations raise on garbage.
    except Exception as error:
        raise Malformed(TRUNCATED) from error


def _colors(file: PlainFile) -> npt.NDArray[Any] | None:
    """A file as uint8 or, if it is deep, uint16 RGB, as stored; None if it cannot be decoded."""
    flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION | (cv2.IMREAD_ANYDEPTH if file.is_deep else 0)
    return _by_opencv(file.encoded, flags)


def _by_opencv(encoded: bytes, flags: int) -> npt.NDArray[Any] | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError from error
        return None


def _by_pillow(encoded: bytes, mode: str) -> npt.NDArray[Any] | None:
    """A file's first frame in a mode of Pillow's; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))
    except MemoryError:
        raise
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception:
        return None


def _with_alpha(file: PlainFile) -> npt.NDArray[Any] | None:
    """A file as RGBA, as stored; None if it has no alpha channel, or cannot be decoded."""
    try:
        with Image.open(io.BytesIO(file.encoded), formats=_FORMATS) as image:
            if not image.has_transparency_data:
                return None
    except MemoryError:
        raise
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception:
        return None
    if not file.is_deep:
        return _by_pillow(file.encoded, "RGBA")
    # Pillow has no colours of 16 bits.
    read = _by_opencv(file.encoded, cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    if read is None or read.ndim != 3 or read.shape[2] != _RGBA:
        return None
    return cv2.cvtColor(read, cv2.COLOR_BGRA2RGBA)


def _range_of_png(file: PlainFile, values: npt.NDArray[Any]) -> tuple[float, tuple[str, ...]]:
    """The value that is white in a PNG of 16 bits.

    A PNG whose pixels had fewer bits says so in its sBIT chunk, and should have them stretched to 16 (PNG
    specification, 11.3.2.4). Many programs write the numbers as they are.
    """
    bits = file.significant_bits or 16
    if bits >= 16 or int(values.max()) >= 1 << bits:
        return 65_535.0, ()
    highest = (1 << bits) - 1
    return float(highest), (f"the file says that its pixels have {bits} bits: read as 0 to {highest}",)
