"""What the INPUT of `heatlens video` names: a URL, the number of a camera, images, or a video file."""

import glob
import re
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from heatlens._exceptions import InvalidArgumentError

_IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# What FFmpeg reads over a network. It knows other schemes that read files (file:, concat:, cache:, ...), past every
# check that an output is none of the inputs.
_SCHEMES = frozenset(
    {"ftp", "http", "https", "rtmp", "rtmps", "rtmpt", "rtp", "rtsp", "rtsps", "sftp", "srt", "tcp", "tls", "udp"}
)
# An int of 32 bits.
_MAX_CAMERA = 2**31 - 1


def is_url(text: str) -> bool:
    """Return whether what the user named is a URL, and not a path."""
    return "://" in text


def checked_url(text: str) -> str:
    """Return a URL that reads from a network.

    Raises:
        InvalidArgumentError: it cannot be parsed, or is of another scheme. The message does not show it: URLs hold
            passwords.
    """
    try:
        scheme = urlsplit(text).scheme.lower()
    except ValueError as error:
        raise InvalidArgumentError.of("INPUT", f"is not a URL: {error}") from None
    if scheme not in _SCHEMES:
        expected = ", ".join(sorted(_SCHEMES))
        raise InvalidArgumentError.of(
            "INPUT", f"expected a URL that starts with one of {expected}, got {scheme!r}; a file is named by its path"
        )
    return text


def camera_of(text: str) -> int | None:
    """Return the camera's number that the user named; None: it is no number, or a file has that name.

    Raises:
        InvalidArgumentError: too large for a camera's number.
    """
    if not (text.isascii() and text.isdigit()) or Path(text).exists():
        return None
    # Lengths first: Python refuses to convert thousands of digits.
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(_MAX_CAMERA)) or int(digits) > _MAX_CAMERA:
        raise InvalidArgumentError.of("INPUT", f"expected a camera's number, at most {_MAX_CAMERA}")
    return int(digits)


def images_of(text: str) -> list[Path] | None:
    """Return the image files that a folder, glob or file name stands for, sorted; None: it is no such thing."""
    path = Path(text)
    if path.is_dir():
        return sorted((entry for entry in path.iterdir() if _is_image(entry)), key=natural_key)
    if path.exists():
        return [path] if _is_image(path) else None
    if not glob.has_magic(text):
        return None
    names = (Path(name) for name in glob.glob(text, recursive=True))  # noqa: PTH207 - absolute patterns too
    return sorted((name for name in names if name.is_file()), key=natural_key)


def files_of(text: str) -> list[Path]:
    """Return the files that will be read: none of them may be written to.

    Raises:
        InvalidArgumentError: nothing was named.
        OSError: a folder cannot be read.
    """
    if not text:
        raise InvalidArgumentError.of("INPUT", "is empty")
    if is_url(text):
        return []
    images = images_of(text)
    if images is not None:
        return images
    path = Path(text)
    return [path] if path.exists() else []


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Return the key that sorts frame2 before frame10."""
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), "") if index % 2 else (1, 0, part.casefold()) for index, part in enumerate(parts)]


def public_name(url: str) -> str:
    """Return a URL without the user and password that it may hold."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _IMAGE_SUFFIXES and path.is_file()
