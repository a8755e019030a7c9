"""What the INPUT of `heatlens video` names: a URL, the number of a camera, images, or a video file."""

import errno
import glob
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit, urlunsplit

from heatlens._exceptions import InvalidArgumentError
from heatlens._video.source import Images, Source

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# What the server reads besides, of images that are sent as files.
SERVER_SUFFIXES = IMAGE_SUFFIXES | {".avif", ".dcm", ".gif", ".heic", ".heif"}
# What FFmpeg reads over a network. It knows other schemes that read files (file:, concat:, cache:, ...), past every
# check that an output is none of the inputs.
_SCHEMES = frozenset(
    {"ftp", "http", "https", "rtmp", "rtmps", "rtmpt", "rtp", "rtsp", "rtsps", "sftp", "srt", "tcp", "tls", "udp"}
)
_ALWAYS_LIVE = frozenset({"rtmp", "rtp", "rtsp", "rtsps", "udp"})
# An int of 32 bits.
_MAX_CAMERA = 2**31 - 1


def open_source(
    text: str,
    *,
    fps: float | None,
    timeout_s: float,
    reconnect_timeout_s: float,
    on_unreadable: Callable[[Path], None],
    tell: Callable[[str], None],
) -> Source:
    """Open what a user named: a file, a folder or glob of images, a URL, or a camera by its number.

    Args:
        text: what the user named. A number is a camera unless there is a file of that name.
        fps: frames per second. None: what the source says, 25 if it says nothing.
        timeout_s: how long a URL may take to open, and to give the next frame.
        reconnect_timeout_s: how long a camera that dropped out is opened again; 0: not at all.
        on_unreadable: called with every image that cannot be decoded; it is left out.
        tell: told when a camera drops out and when it is back, in one line each.

    Raises:
        InvalidArgumentError: it is no URL, or not one that is read over a network, or too large for a camera's number.
        OSError: it does not exist, cannot be opened or holds no frame; `filename` and `strerror` say so.
        ImportError: it is no image, and the extra `video` is not installed.
    """
    images = None if is_url(text) else images_of(text)
    if images is not None:
        return Images(images, text, fps=fps, on_unreadable=on_unreadable)
    from heatlens._video.pyav import Reconnection, open_video  # noqa: PLC0415 - an extra

    reconnection = Reconnection(silence_s=timeout_s, timeout_s=reconnect_timeout_s, tell=tell)
    if is_url(text):
        scheme = urlsplit(checked_url(text)).scheme.lower()
        live = True if scheme in _ALWAYS_LIVE else None
        # As OpenCV does: cameras lose packets of UDP.
        options = {"rtsp_flags": "prefer_tcp"} if scheme in {"rtsp", "rtsps"} else {}
        name = public_name(text)
        return _in_thread(
            lambda: open_video(
                text, name, fps=fps, live=live, timeout_s=timeout_s, options=options, reconnection=reconnection
            )
        )
    camera = camera_of(text)
    if camera is None and not Path(text).is_char_device():
        # With the prefix, no file's name looks like a URL.
        return open_video(f"file:{text}", text, fps=fps, live=False)
    device, name = (text, text) if camera is None else (f"/dev/video{camera}", f"camera {text}")
    if sys.platform != "linux":
        raise OSError(errno.ENODEV, "cameras are read on Linux only", name)
    return open_video(device, name, fps=fps, live=True, format_name="v4l2", reconnection=reconnection)


def _in_thread(open_one: Callable[[], Source]) -> Source:
    """Call `open_one` in another thread and return what it returns, or raise what it raises.

    A URL may take its whole timeout to open, in a library that no signal ends. This wait, Ctrl-C ends.
    """
    outcome: SimpleQueue[Source | Exception] = SimpleQueue()

    def run() -> None:
        try:
            outcome.put(open_one())
        except Exception as error:
            outcome.put(error)

    # A daemon: it must not keep the process alive.
    threading.Thread(target=run, name="heatlens-open", daemon=True).start()
    result = outcome.get()
    if isinstance(result, Exception):
        raise result
    return result


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


def images_of(text: str, *, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> list[Path] | None:
    """Return the image files that a folder, glob or file name stands for, sorted; None: it is no such thing."""
    path = Path(text)
    if path.is_dir():
        return sorted((entry for entry in path.iterdir() if _is_image(entry, suffixes)), key=natural_key)
    if path.exists():
        return [path] if _is_image(path, suffixes) else None
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


def _is_image(path: Path, suffixes: frozenset[str]) -> bool:
    return path.suffix.lower() in suffixes and path.is_file()
