"""What a caller may pass as an image: a path, the bytes of an image file, or RGB pixels."""

from os import PathLike, fsdecode, fsencode
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from heatlens._exceptions import InvalidArgumentError

UInt8Array = npt.NDArray[np.uint8]
ImageSource: TypeAlias = str | PathLike[str] | bytes | bytearray | memoryview | npt.NDArray[Any]


def load_image(image: ImageSource, *, argument: str = "image") -> bytes | UInt8Array:
    """Return what is sent for an image: the file's bytes as they are, or its pixels.

    Args:
        image: a path, the bytes of a JPEG, PNG or WebP file, or uint8 RGB pixels of shape (height, width, 3).
        argument: what the caller calls it, for errors.

    Returns:
        The bytes of the file, or uint8 (height, width, 3), C-contiguous.

    Raises:
        InvalidArgumentError: the array is not uint8 (height, width, 3), the file is empty, the path is none, or the
            type is another.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    if isinstance(image, np.ndarray):
        return np.ascontiguousarray(_checked_pixels(image, argument))
    if isinstance(image, str | PathLike):
        path = checked_path(argument, image)
        encoded = path.read_bytes()
        origin = f"the file {str(path)!r}"
    elif isinstance(image, bytes | bytearray | memoryview):
        encoded = bytes(image)
        origin = "the encoded image"
    else:
        raise InvalidArgumentError.of(
            argument, f"expected a path, bytes or a uint8 array (height, width, 3), got {type(image).__name__}"
        )
    if not encoded:
        raise InvalidArgumentError.of(argument, f"{origin} is empty", reason="IMAGE_EMPTY")
    return encoded


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
    """Decode an image to upright RGB pixels, as the server sees it: EXIF orientation applied, no alpha, 8 bits.

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
        return loaded
    try:
        pixels = cv2.imdecode(np.frombuffer(loaded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise InvalidArgumentError.of("image", "cannot be decoded", reason="IMAGE_UNDECODABLE")
    return np.asarray(pixels, dtype=np.uint8)


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


def _checked_pixels(pixels: npt.NDArray[Any], argument: str) -> UInt8Array:
    if pixels.dtype != np.uint8:
        raise InvalidArgumentError.of(argument, f"expected pixels of type uint8, got {pixels.dtype}")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
        raise InvalidArgumentError.of(argument, f"expected RGB pixels of shape (height, width, 3), got {pixels.shape}")
    return pixels
