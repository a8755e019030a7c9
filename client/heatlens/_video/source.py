"""Where frames come from: a video file, images, a URL or a camera."""

import errno
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import cv2
import numpy as np

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.images import UInt8Array, decode_image
from heatlens._video.clock import Clock
from heatlens._video.inputs import camera_of, checked_url, images_of, is_url, public_name
from heatlens._video.live import LiveVideo
from heatlens._video.quiet import silence

DEFAULT_FPS = 25.0
# Containers and drivers that know no rate tell 0, nan, or their clock's rate, such as 90,000.
_MAX_FPS = 1000.0
# How long `close` waits for a read that is under way.
_CLOSE_TIMEOUT_S = 2.0
# Containers that only estimate how many frames they hold are wrong by so many, or by such a part.
_COUNT_SLACK, _COUNT_SLACK_SHARE = 5, 0.005
_ALWAYS_LIVE = frozenset({"rtmp", "rtp", "rtsp", "rtsps", "udp"})


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrame:
    """One picture of a film.

    Attributes:
        frame_id: 0, 1, 2, ...: its place among the frames that the source gave.
        time_s: when it is shown, in seconds from the first frame.
        pixels: uint8 (H, W, 3), RGB, of the source's size.
    """

    frame_id: int
    time_s: float
    pixels: UInt8Array


class Source(Protocol):
    """Frames of one size. Iterate once; `close` when done, even in the middle.

    Attributes:
        fps: frames per second of the film to write.
        size: (width, height) of every frame, in pixels.
        live: whether frames come at their own time, and are lost if nobody takes them.
        total: how many frames there are; None if the source does not tell.
        missed: how many frames of a live source nobody took.
        lacking: how many of `total` frames were not there when the source came to its end: it is damaged. 0 before,
            and where the difference may be an estimate's.
    """

    @property
    def fps(self) -> float:
        """Frames per second."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    @property
    def live(self) -> bool:
        """Whether frames come at their own time."""

    @property
    def total(self) -> int | None:
        """How many frames there are."""

    @property
    def missed(self) -> int:
        """How many frames nobody took."""

    @property
    def lacking(self) -> int:
        """How many frames were not there."""

    def __iter__(self) -> Iterator[VideoFrame]: ...

    def close(self) -> None:
        """Let go of the file or camera. Idempotent."""


def open_source(text: str, *, fps: float | None, timeout_s: float, on_unreadable: Callable[[Path], None]) -> Source:
    """Open what a user named: a file, a folder or glob of images, a URL, or a camera by its number.

    Args:
        text: what the user named. A number is a camera unless there is a file of that name.
        fps: frames per second. None: what the source says, 25 if it says nothing.
        timeout_s: how long a URL may take to open, and to give the next frame.
        on_unreadable: told of every image that cannot be decoded; it is left out.

    Raises:
        InvalidArgumentError: it is no URL, or not one that is read over a network, or too large for a camera's number.
        OSError: it does not exist, cannot be opened or holds no frame; `filename` and `strerror` say so.
    """
    silence()
    if is_url(text):
        return _open_url(checked_url(text), fps, timeout_s)
    camera = camera_of(text)
    if camera is not None:
        return _open_live(cv2.VideoCapture(camera), f"camera {text}", fps)
    images = images_of(text)
    if images is not None:
        return _open_images(images, text, fps, on_unreadable)
    path = Path(text)
    if path.is_char_device():
        return _open_live(cv2.VideoCapture(text), text, fps)
    with path.open("rb"):  # says why it cannot be opened, where OpenCV only says that
        pass
    return _open_video(cv2.VideoCapture(text), text, fps)


def letterbox(pixels: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Fit a picture into `size` (width, height): scaled, its shape kept, black bars on two sides.

    Returns:
        uint8 (height, width, 3); the picture itself if it has that size.
    """
    width_px, height_px = size
    rows, columns = pixels.shape[:2]
    if (columns, rows) == size:
        return pixels
    scale = min(width_px / columns, height_px / rows)
    inner_width = min(max(round(columns * scale), 1), width_px)
    inner_height = min(max(round(rows * scale), 1), height_px)
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    result = np.zeros((height_px, width_px, 3), np.uint8)
    left, top = (width_px - inner_width) // 2, (height_px - inner_height) // 2
    result[top : top + inner_height, left : left + inner_width] = cv2.resize(
        pixels, (inner_width, inner_height), interpolation=method
    )
    return result


@dataclass(eq=False)
class _Images:
    """Image files, one after the other. The film has the first one's size."""

    paths: list[Path]
    fps: float
    first: UInt8Array
    on_unreadable: Callable[[Path], None]
    live: bool = field(default=False, init=False)
    missed: int = field(default=0, init=False)
    # Those that cannot be read are told one by one.
    lacking: int = field(default=0, init=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.first.shape[1], self.first.shape[0]

    @property
    def total(self) -> int | None:
        return len(self.paths)

    def __iter__(self) -> Iterator[VideoFrame]:
        frame_id = 0
        for index, path in enumerate(self.paths):
            pixels = self.first if index == 0 else _read_image(path, self.on_unreadable)
            if pixels is not None:
                yield VideoFrame(frame_id, frame_id / self.fps, letterbox(pixels, self.size))
                frame_id += 1

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(eq=False)
class _Video:
    """A video that waits: a file, or a finite one behind a URL.

    Attributes:
        fps: frames per second of the film to write.
        total: how many frames the container tells.
        rate: frames per second that the container tells.
        clock: the times of the frames, by the container.
        timed: whether these count; otherwise a frame comes every 1 / fps.
    """

    capture: cv2.VideoCapture
    fps: float
    first: UInt8Array
    total: int | None
    rate: float
    clock: Clock
    timed: bool
    live: bool = field(default=False, init=False)
    missed: int = field(default=0, init=False)
    lacking: int = field(default=0, init=False)
    _closed: bool = field(default=False, init=False)
    # Frames are read in one thread and the source is closed in another, but no capture bears both at a time.
    _busy: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def size(self) -> tuple[int, int]:
        return self.first.shape[1], self.first.shape[0]

    def __iter__(self) -> Iterator[VideoFrame]:
        frame_id, time_s, pixels = 0, 0.0, self.first
        while True:
            yield VideoFrame(frame_id, time_s, pixels)
            with self._busy:
                # A capture that is released reads nothing.
                read, picture = self.capture.read()
                clock_s = _timestamp_s(self.capture)
            frame_id += 1
            if not read:
                if not self._closed:
                    self.lacking = self._lacking(frame_id)
                return
            clock_time_s = self.clock.tick(clock_s)
            time_s = clock_time_s if self.timed else frame_id / self.fps
            pixels = letterbox(_rgb(picture), self.size)

    def close(self) -> None:
        self._closed = True
        # A URL that hangs must not hang the program: what is not released ends with the process.
        if self._busy.acquire(timeout=_CLOSE_TIMEOUT_S):
            self.capture.release()
            self._busy.release()

    def _lacking(self, read: int) -> int:
        """Return how many frames of `total` were not read, if the video clearly broke off."""
        if self.total is None:
            return 0
        slack = max(_COUNT_SLACK, self.total * _COUNT_SLACK_SHARE)
        # Some containers take the count from their length and their highest rate. So the clock must be short, too.
        clock_count = self.clock.time_s * self.rate + 1
        return self.total - read if self.total - max(read, clock_count) > slack else 0


@dataclass(eq=False)
class _Live:
    """A camera or an endless stream: always the newest frame."""

    video: LiveVideo
    fps: float
    size: tuple[int, int]
    live: bool = field(default=True, init=False)
    total: int | None = field(default=None, init=False)
    lacking: int = field(default=0, init=False)

    @property
    def missed(self) -> int:
        return self.video.missed

    def __iter__(self) -> Iterator[VideoFrame]:
        start_s = None
        for frame_id, (taken_s, picture) in enumerate(self.video):
            start_s = taken_s if start_s is None else start_s
            yield VideoFrame(frame_id, taken_s - start_s, letterbox(_rgb(picture), self.size))

    def close(self) -> None:
        self.video.close()


def _open_images(paths: list[Path], name: str, fps: float | None, on_unreadable: Callable[[Path], None]) -> Source:
    for index, path in enumerate(paths):
        first = _read_image(path, on_unreadable)
        if first is not None:
            return _Images(paths[index:], fps or DEFAULT_FPS, first, on_unreadable)
    raise FileNotFoundError(errno.ENOENT, "no image there can be read" if paths else "no images there", name)


def _read_image(path: Path, on_unreadable: Callable[[Path], None]) -> UInt8Array | None:
    try:
        return decode_image(path)
    except (InvalidArgumentError, OSError):
        on_unreadable(path)
        return None


def _open_url(url: str, fps: float | None, timeout_s: float) -> Source:
    timeout_ms = math.ceil(min(timeout_s, 1e6) * 1000)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms]
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, limits)
    # A file behind a URL tells how many frames it has, a camera cannot.
    live = urlsplit(url).scheme.lower() in _ALWAYS_LIVE or not _frame_count(capture)
    return (_open_live if live else _open_video)(capture, public_name(url), fps)


def _open_video(capture: cv2.VideoCapture, name: str, fps: float | None) -> Source:
    first = _first_picture(capture, name)
    rate = _frame_rate(capture)
    clock = Clock(1 / rate, _timestamp_s(capture))
    # A rate that the user gives replaces the timestamps.
    return _Video(capture, fps or rate, first, _frame_count(capture), rate, clock, timed=fps is None)


def _open_live(capture: cv2.VideoCapture, name: str, fps: float | None) -> Source:
    first = _first_picture(capture, name)
    size = (first.shape[1], first.shape[0])
    return _Live(LiveVideo(capture), fps or _frame_rate(capture), size)


def _first_picture(capture: cv2.VideoCapture, name: str) -> UInt8Array:
    """Read the first frame: the size that a container states is not always that of its pictures."""
    if not capture.isOpened():
        raise OSError(errno.EINVAL, "cannot be opened as a video", name)
    read, picture = capture.read()
    if not read:
        capture.release()
        raise OSError(errno.ENODATA, "holds no frames", name)
    return _rgb(picture)


def _frame_rate(capture: cv2.VideoCapture) -> float:
    fps = float(capture.get(cv2.CAP_PROP_FPS))
    return fps if 0 < fps <= _MAX_FPS else DEFAULT_FPS


def _frame_count(capture: cv2.VideoCapture) -> int | None:
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return round(count) if 0 < count < 1e9 else None


def _timestamp_s(capture: cv2.VideoCapture) -> float:
    """Return when the frame that was read last is shown, by the container's clock."""
    return float(capture.get(cv2.CAP_PROP_POS_MSEC)) / 1000


def _rgb(picture: object) -> UInt8Array:
    return np.asarray(cv2.cvtColor(np.asarray(picture), cv2.COLOR_BGR2RGB), dtype=np.uint8)
