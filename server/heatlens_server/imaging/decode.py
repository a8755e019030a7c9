"""From the bytes of a request to pixels. Everything here reads untrusted input."""

import importlib
import importlib.util
import io
import warnings
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.dicom import decode_dicom, is_dicom
from heatlens_server.imaging.levels import SourcePixels
from heatlens_server.imaging.limits import check_size, undecodable
from heatlens_server.imaging.orientation import ORIENTATION, upright
from heatlens_server.imaging.tiff import decode_tiff, is_tiff


def _formats_of_pillow() -> tuple[str, ...]:
    """The further formats that this installation of Pillow reads, and HEIC where pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is not None:
        import pillow_heif  # noqa: PLC0415 - nothing needs it but files of this format

        pillow_heif.register_heif_opener()
    # Pillow has forty of them, which take as long to import as numpy.
    for plugin in ("Avif", "Bmp", "Gif", "Jpeg", "Png", "Tiff", "WebP"):
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
    return tuple(name for name in ("BMP", "GIF", "AVIF", "HEIF") if name in Image.OPEN)


# Those that OpenCV reads fastest, and those that Pillow reads.
_FAST = frozenset({"JPEG", "MPO", "PNG", "WEBP"})
_FORMATS = ("JPEG", "PNG", "WEBP", *_formats_of_pillow())
_RGB, _RGBA = 3, 4
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# In HEIC's header: the type of its first box, and the brands of it that stand for HEIC.
_HEIC_BRANDS = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypheis", b"ftypmif1", b"ftypmsf1")

# In a PNG's header: signature, length and type of the chunk, width and height come first.
_PNG_BIT_DEPTH_AT = 24

# OpenCV logs what is wrong with a file to stderr; the caller is told.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

# Beyond its limit Pillow warns first and raises only at twice the limit. As an error the warning becomes a refusal.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def decode_image(
    encoded: bytes, *, max_pixels: int, channels: int = _RGB, field: str = "image.encoded"
) -> SourcePixels:
    """Decode an image file, upright: JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, and HEIC and DICOM where they can be read.

    The EXIF orientation is applied; gray, palette and CMYK become RGB; an alpha channel is dropped (colours are not
    blended with a background) unless the model takes four channels. 16-bit PNG files keep their 16 bits; TIFF and
    DICOM: see `decode_tiff` and `decode_dicom`. Of an animation the first frame is read. The size is taken from the
    header and checked before any pixel is decoded. A truncated file is refused, never padded: OpenCV refuses JPEG and
    WebP itself; a PNG's chunks and their checksums are read first, which costs about 2 % of decoding it and keeps
    libpng from printing to stderr.

    Args:
        encoded: the file's bytes.
        max_pixels: largest accepted width times height.
        channels: of the model's input.
        field: the name of `encoded` in errors.

    Returns:
        The image; RGB, or RGBA if the model takes four channels and the file has an alpha channel.

    Raises:
        InvalidArgument: IMAGE_UNDECODABLE or IMAGE_TOO_LARGE, at `field`.
    """
    if not encoded:
        raise undecodable(field, "the image is empty")
    if is_tiff(encoded):
        return decode_tiff(encoded, channels=channels, max_pixels=max_pixels, field=field)
    if is_dicom(encoded):
        return decode_dicom(encoded, max_pixels=max_pixels, field=field)
    file_format, size = _checked_size(encoded, max_pixels, field)
    deep = encoded.startswith(_PNG_SIGNATURE) and encoded[_PNG_BIT_DEPTH_AT] == 16
    values = _with_alpha(encoded, deep=deep) if channels == _RGBA else None
    if values is None:
        values = _colors(encoded, deep=deep) if file_format in _FAST else _by_pillow(encoded, "RGB")
    # A file that two decoders read differently is a trick; the limit was checked on one reading only.
    if values is None or sorted(values.shape[:2]) != sorted(size):
        raise undecodable(field, "the image is truncated or corrupt")
    if values.dtype == np.uint8:
        return SourcePixels(values, field=field, highest=255.0)
    highest, notes = _range_of_png(encoded, values)
    return SourcePixels(values, field=field, highest=highest, warnings=notes)


def _colors(encoded: bytes, *, deep: bool) -> npt.NDArray[Any] | None:
    """A file as uint8 or, if it is deep, uint16 RGB; None if it cannot be decoded."""
    flags = cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_ANYDEPTH if deep else 0)
    try:
        return cv2.imdecode(np.frombuffer(_without_png_profile(encoded), np.uint8), flags)
    except cv2.error:
        return None


def _by_pillow(encoded: bytes, mode: str) -> npt.NDArray[Any] | None:
    """A file's first frame, upright, in a mode of Pillow's; None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert(mode))
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception:
        return None


def _with_alpha(encoded: bytes, *, deep: bool) -> npt.NDArray[Any] | None:
    """A file as RGBA; None if it has no alpha channel, or cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if not image.has_transparency_data:
                return None
            orientation = image.getexif().get(ORIENTATION, 1)
        if not deep:
            return _by_pillow(encoded, "RGBA")
        # Pillow has no colours of 16 bits.
        read = cv2.imdecode(np.frombuffer(_without_png_profile(encoded), np.uint8), cv2.IMREAD_UNCHANGED)
        values = None if read is None else upright(cv2.cvtColor(read, cv2.COLOR_BGRA2RGBA), orientation)
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception:
        return None
    return values


def _range_of_png(encoded: bytes, values: npt.NDArray[Any]) -> tuple[float, tuple[str, ...]]:
    """The value that is white in a PNG of 16 bits.

    A PNG whose pixels had fewer bits says so in its sBIT chunk, and should have them stretched to 16 (PNG
    specification, 11.3.2.4). Many programs write the numbers as they are.
    """
    bits = next((max(data) for kind, data in _png_chunks(encoded) if kind == b"sBIT" and data), 16)
    if not 1 <= bits < 16 or int(values.max()) >= 1 << bits:
        return 65_535.0, ()
    highest = (1 << bits) - 1
    return float(highest), (f"the file says that its pixels have {bits} bits: read as 0 to {highest}",)


def _png_chunks(encoded: bytes) -> list[tuple[bytes, bytes]]:
    """The chunks of a PNG before its pixels, by type."""
    chunks, start = [], len(_PNG_SIGNATURE)
    while start + 8 <= len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        kind = encoded[start + 4 : start + 8]
        if kind == b"IDAT":
            break
        chunks.append((kind, encoded[start + 8 : end - 4]))
        start = end
    return chunks


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


def _checked_size(encoded: bytes, max_pixels: int, field: str) -> tuple[str, tuple[int, int]]:
    """Return the format and (width, height) from the header, once they are acceptable. Checks a PNG's chunks."""
    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            width_px, height_px = image.size
            check_size(width_px, height_px, max_pixels, field=field)
            file_format = str(image.format)
            if file_format == "PNG":
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
        if encoded[4:12] in _HEIC_BRANDS and "HEIF" not in _FORMATS:
            raise undecodable(
                field, "a HEIC file, which this server does not read: install heatlens with the extra heic"
            ) from error
        raise undecodable(field, "not a JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF, HEIC or DICOM image") from error
    # Pillow's parsers raise whatever their struct, zlib and index operations raise on garbage.
    except Exception as error:
        raise undecodable(field, "the image is truncated or corrupt") from error
    return file_format, (width_px, height_px)
