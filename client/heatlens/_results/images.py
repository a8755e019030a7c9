"""What a caller may pass as an image: a path, a file, the bytes of an image file, a PIL image, or pixels."""

import sys
from os import PathLike, fsdecode, fsencode
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeGuard

import cv2
import numpy as np
import numpy.typing as npt

from heatlens._exceptions import InvalidArgumentError

UInt8Array = npt.NDArray[np.uint8]

# Pillow's modes of more than 8 bits: Pillow itself would cut them off at 255.
_DEEP_MODES = frozenset({"I", "F", "I;16", "I;16B", "I;16L", "I;16N"})


class BinaryFile(Protocol):
    """A file that is open for reading bytes."""

    def read(self, size: int = -1, /) -> bytes: ...


class PilImage(Protocol):
    """An image of Pillow, which need not be installed."""

    @property
    def mode(self) -> str: ...

    def convert(self, mode: str, /) -> Any: ...  # noqa: ANN401 - another such image


ImageSource: TypeAlias = str | PathLike[str] | bytes | bytearray | memoryview | npt.NDArray[Any] | BinaryFile | PilImage


PixelArray: TypeAlias = npt.NDArray[np.uint8 | np.uint16 | np.float32]

# A 16-bit picture without a value from here on is drawn brighter, or it would be black.
_LOOKS_BLACK = 1 << 14


def load_image(image: ImageSource, *, argument: str = "image") -> bytes | PixelArray:
    """Return what is sent for an image: the file's bytes as they are, or its pixels.

    Args:
        image: a path, the bytes of an image file, a file opened in binary mode (read from where it stands to its end;
            one that can seek is put back there), a PIL image (its EXIF orientation is applied, an alpha channel
            dropped), or pixels of shape (height, width, channels) or (height, width): uint8, uint16, or floats, which
            mean 0 to 1 unless the model has a window. RGB where there are three channels.
        argument: what the caller calls it, for errors.

    Returns:
        The bytes of the file, or uint8, uint16 or float32 pixels, C-contiguous.

    Raises:
        InvalidArgumentError: the array is of another shape or type, the file is empty, the path is none, or the type is
            another.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    if is_pil(image):
        image = pil_pixels(image, _DEEP_MODES, otherwise="RGB")
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(_checked_pixels(image, argument))
    if isinstance(image, str | PathLike):
        path = checked_path(argument, image)
        encoded = path.read_bytes()
        origin = f"the file {str(path)!r}"
    elif isinstance(image, bytes | bytearray | memoryview):
        encoded = bytes(image)
        origin = "the encoded image"
    elif is_file(image):
        encoded = _rest_of(image, argument)
        origin = "the file, from where it stands,"
    else:
        raise InvalidArgumentError.of(
            argument,
            "expected a path, bytes, a binary file, a PIL image or an array (height, width, channels), "
            f"got {type(image).__name__}",
        )
    if not encoded:
        raise InvalidArgumentError.of(argument, f"{origin} is empty", reason="IMAGE_EMPTY")
    return encoded


def may_block(image: object) -> bool:
    """Whether `load_image` reads a file or lets Pillow decode one, for callers that must not block."""
    return isinstance(image, str | PathLike) or is_file(image) or is_pil(image)


def is_file(image: object) -> TypeGuard[BinaryFile]:
    """Whether this is a file, or something like it."""
    return callable(getattr(image, "read", None))


def is_pil(image: object) -> TypeGuard[PilImage]:
    """Whether this is an image of Pillow. Pillow is not loaded for that: who has an image has loaded it."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(image, pillow.Image)


def pil_pixels(image: Any, modes: frozenset[str], *, otherwise: str) -> npt.NDArray[Any]:  # noqa: ANN401 - Pillow's
    """Return the upright pixels of a PIL image: as they are if its mode is one of `modes`, or else in that mode.

    Raises:
        OSError: the file behind the image cannot be read.
    """
    from PIL import ImageOps  # noqa: PLC0415 - who has an image has Pillow

    upright = ImageOps.exif_transpose(image)
    pixels = np.asarray(upright if upright.mode in modes else upright.convert(otherwise))
    # TIFF files may be big-endian.
    return pixels.astype(pixels.dtype.newbyteorder("="), copy=False)


def _rest_of(file: BinaryFile, argument: str) -> bytes:
    """Return a file's bytes from where it stands; one that can seek is put back there, to be read again."""
    try:
        start = file.tell() if (seekable := getattr(file, "seekable", None)) and seekable() else None  # type: ignore[attr-defined]
        data: object = file.read()
        if start is not None:
            file.seek(start)  # type: ignore[attr-defined]
    except ValueError as error:
        # It is closed, or a text file in another encoding.
        raise InvalidArgumentError.of(argument, f"cannot be read: {error}", reason="IMAGE_UNREADABLE") from None
    if not isinstance(data, bytes | bytearray | memoryview):
        raise InvalidArgumentError.of(
            argument, f"expected a file opened in binary mode, but its read() returned {type(data).__name__}"
        )
    return bytes(data)


def checked_path(argument: str, path: str | PathLike[Any]) -> Path:
    """Return the path, which need not exist.

    Raises:
        InvalidArgumentError: not a path, or one that no file system could hold.
    """
    try:
        name = fsencode(path)
    except (TypeError, ValueError):
        name = b"\0"
    if isinstance(path, bytes) or b"\0" in name:
        raise InvalidArgumentError.of(argument, f"expected a path, got {path!r}")
    return Path(fsdecode(name))


def decode_image(image: ImageSource) -> UInt8Array:
    """Decode an image to upright RGB pixels to draw on: EXIF orientation applied, no alpha, 8 bits.

    Args:
        image: as for `load_image`.

    Returns:
        uint8 (height, width, 3).

    Raises:
        InvalidArgumentError: not an image.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    loaded = load_image(image)
    if isinstance(loaded, np.ndarray):
        return _drawable(loaded)
    try:
        pixels = cv2.imdecode(np.frombuffer(loaded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise InvalidArgumentError.of("image", "cannot be decoded", reason="IMAGE_UNDECODABLE")
    return _drawable(pixels)


def is_rgb(loaded: bytes | PixelArray) -> TypeGuard[UInt8Array]:
    """Whether what `load_image` returned is uint8 RGB (height, width, 3)."""
    return isinstance(loaded, np.ndarray) and loaded.dtype == np.uint8 and loaded.ndim == 3 and loaded.shape[2] == 3


def encode_jpeg(pixels: UInt8Array, quality: int, *, argument: str) -> bytes:
    """Encode RGB pixels, uint8 (height, width, 3), as a JPEG file of quality 1 to 100.

    Raises:
        InvalidArgumentError: larger than the 65,500 pixels a side that OpenCV's JPEG allows.
    """
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    # What is too large is an error in some versions of OpenCV, and a flag in others.
    try:
        encodable, encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    except cv2.error:
        encodable = False
    if not encodable:
        height_px, width_px = pixels.shape[:2]
        raise InvalidArgumentError.of(argument, f"cannot be a JPEG of {width_px}x{height_px} pixels")
    return encoded.tobytes()


def write_image(path: Path, pixels: UInt8Array) -> None:
    """Write RGB pixels as an image file of the type that the path's suffix names.

    Raises:
        InvalidArgumentError: the suffix names no image type, or one that allows no image of this size.
        OSError: the file cannot be written.
    """
    try:
        encodable, encoded = cv2.imencode(path.suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
    except cv2.error:
        raise InvalidArgumentError.of(
            "path", f"expected a suffix such as .npy, .png or .jpg, got {path.name!r}"
        ) from None
    if not encodable:
        height_px, width_px = pixels.shape[:2]
        raise InvalidArgumentError.of("path", f"no {path.suffix} file can hold {width_px}x{height_px} pixels")
    path.write_bytes(encoded.tobytes())


def write_mask(path: Path, mask: UInt8Array) -> None:
    """Write a mask, uint8 (height, width), as a PNG whose pixels are its numbers, each in a colour of its own.

    The colours are those of PASCAL VOC, as segmentation's tools have them: 0 is black, 255 is cream.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image  # noqa: PLC0415 - OpenCV writes no palettes; who wants none need not wait for Pillow

    image = Image.frombytes("P", (mask.shape[1], mask.shape[0]), mask.tobytes())
    image.putpalette(_voc_palette().ravel().tolist())
    image.save(path, format="PNG")


def _voc_palette() -> UInt8Array:
    """Return the colours of PASCAL VOC, uint8 (256, 3): red, green and blue take a number's bits in turn."""
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def _drawable(pixels: npt.NDArray[Any]) -> UInt8Array:
    """Pixels of any kind as uint8 RGB (height, width, 3); uint8 RGB as it is."""
    if pixels.dtype != np.uint8:
        values = np.nan_to_num(pixels.astype(np.float32))
        low, high = float(values.min()), float(values.max())
        if pixels.dtype == np.uint16 and high >= _LOOKS_BLACK:
            low, high = 0.0, 65_535.0
        elif pixels.dtype != np.uint16 and low >= 0.0 and high <= 1.0:
            low, high = 0.0, 1.0
        values = (values - low) * (255.0 / ((high - low) or 1.0))
        pixels = np.rint(values).astype(np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] < 3:
        gray = pixels if pixels.ndim == 2 else pixels[:, :, 0]
        return np.repeat(gray[:, :, None], 3, axis=2).astype(np.uint8, copy=False)
    return pixels if pixels.shape[2] == 3 else np.ascontiguousarray(pixels[:, :, :3], dtype=np.uint8)


def _checked_pixels(pixels: npt.NDArray[Any], argument: str) -> PixelArray:
    if pixels.ndim not in {2, 3} or pixels.size == 0:
        raise InvalidArgumentError.of(
            argument, f"expected pixels of shape (height, width, channels) or (height, width), got {pixels.shape}"
        )
    if pixels.dtype == np.float64:
        return pixels.astype(np.float32)
    if pixels.dtype not in {np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32)}:
        raise InvalidArgumentError.of(argument, f"expected pixels of type uint8, uint16 or float32, got {pixels.dtype}")
    return pixels
