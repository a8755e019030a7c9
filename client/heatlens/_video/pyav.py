"""Video files, URLs and cameras, read by PyAV. Needs the extra `video`."""

import errno
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from heatlens._results.images import UInt8Array
from heatlens._video.reconnect import reconnected
from heatlens._video.source import DEFAULT_FPS, Source, VideoFrame, letterbox

# A longer step from one frame to the next is a broken timestamp, not a pause.
MAX_STEP_S = 600.0
# Containers that know no rate state 0, or their clock's rate, such as 90,000.
_MAX_FPS = 1000.0
# A video that ends so much before the time that its container states is damaged. What is shorter is rounding.
_MISSING_FRAMES, _MISSING_SHARE = 5, 0.005
# How long `close` waits for a camera's thread. A camera that hangs must not hang the program.
_CLOSE_TIMEOUT_S = 2.0
# How much later than FFmpeg's own timeouts, and the last attempt to open it again, a camera counts as hanging.
_HANG_SLACK_S = 5.0


@dataclass(frozen=True, slots=True)
class Reconnection:
    """What to do when a camera drops out.

    Attributes:
        silence_s: how long a camera that drops no connection may give no frame.
        timeout_s: how long one that dropped out is opened again; 0: not at all.
        tell: told when it drops out and when it is back, in one line each.
    """

    silence_s: float
    timeout_s: float
    tell: Callable[[str], None]


@contextmanager
def ffmpeg_errors(name: str, what: str = "") -> Iterator[None]:
    """Turn FFmpeg's errors, which are of many types, into an OSError with this file name; `what` begins its text."""
    try:
        yield
    except av.error.ExitError:
        raise TimeoutError(errno.ETIMEDOUT, f"{what}no answer before the timeout", name) from None
    except av.error.FFmpegError as error:
        raise OSError(error.errno, f"{what}{error.strerror}", name) from None


def open_video(
    location: str,
    name: str,
    *,
    fps: float | None,
    live: bool | None,
    format_name: str | None = None,
    timeout_s: float | None = None,
    options: dict[str, str] | None = None,
    reconnection: Reconnection | None = None,
) -> Source:
    """Open a video and read its first frame.

    Args:
        location: path, URL or device, for FFmpeg.
        name: what messages call it.
        fps: frames per second, which replace the container's times. None: what the container states, or 25.
        live: whether only the newest frame counts. None: if the container states no length, and the server no size.
        format_name: what FFmpeg calls the format or the kind of device. None: found by FFmpeg.
        timeout_s: how long a network may take to open it, and to give the next frame. None: for ever.
        options: of the format, for FFmpeg.
        reconnection: what to do when a live one drops out, unless it states its length. None: it ends there.

    Raises:
        OSError: it cannot be opened, or holds no video.
    """

    def begin() -> tuple[InputContainer, VideoStream]:
        with ffmpeg_errors(name, "cannot be opened as a video: "):
            container = av.open(location, format=format_name, timeout=timeout_s, options=options)
        # The cover of an album is a video stream to FFmpeg.
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams or streams[0].codec_context is None:
            container.close()
            raise OSError(errno.ENODATA, "holds no video" if not streams else "has a codec that is unknown here", name)
        return container, streams[0]

    def begin_again() -> Generator[av.VideoFrame, None, None]:
        yield from _decoded(*begin(), name)

    container, stream = begin()
    rate = float(stream.average_rate or 0)
    rate = rate if 0 < rate <= _MAX_FPS else DEFAULT_FPS
    length_s = _length_s(container, stream)
    if live is None:
        live = length_s is None and not container.duration and container.size <= 0
    if not live:
        # Threads per frame are faster, but hold frames back.
        stream.thread_type = "AUTO"
    total = stream.frames or round((length_s or (container.duration or 0) / av.time_base) * rate) or None
    frames = _decoded(container, stream, name)
    first = next(frames, None)
    if first is None:
        raise OSError(errno.ENODATA, "holds no frames", name)
    if not live:
        return _Video(first, frames, fps=fps, rate=rate, total=total, length_s=length_s)
    ended = threading.Event()
    hang_s = None
    # A recording on a media server states its length, and ends.
    if reconnection is not None and not container.duration:
        again = reconnection.timeout_s
        frames = reconnected(frames, begin_again, name=name, timeout_s=again, wait=ended.wait, tell=reconnection.tell)
        hang_s = reconnection.silence_s + again + _HANG_SLACK_S
    return LiveVideo(frames, name=name, fps=fps or rate, size=_size(first), hang_s=hang_s, ended=ended)


class _Video(Source):
    """A video that waits for its reader: a file, or a finite one behind a URL.

    Args:
        first: its first frame.
        frames: those after it.
        fps: frames per second, which replace the times of the frames. None: their times count.
        rate: frames per second that the container states.
        total: how many frames the container states.
        length_s: how long the video is, in seconds, as the container states.
    """

    def __init__(
        self,
        first: av.VideoFrame,
        frames: Generator[av.VideoFrame, None, None],
        *,
        fps: float | None,
        rate: float,
        total: int | None,
        length_s: float | None,
    ) -> None:
        super().__init__(fps=fps or rate, size=_size(first), live=False, total=total)
        self._first = first
        self._frames = frames
        self._timed = fps is None
        self._period_s = 1 / rate
        self._length_s = length_s
        self._closed = False

    def __iter__(self) -> Iterator[VideoFrame]:
        time_s, before = 0.0, None
        for frame_id, frame in enumerate(chain([self._first], self._frames)):
            if before is not None:
                time_s += step_s(before.time, frame.time, self._period_s)
            before = frame
            shown_s = time_s if self._timed else frame_id / self.fps
            yield VideoFrame(frame_id, shown_s, letterbox(_pixels(frame), self.size))
        if not self._closed:
            self.missing = self._count_missing(frame_id + 1, time_s + self._period_s)

    def close(self) -> None:
        self._closed = True
        # While another thread reads, which nothing can end, the frames cannot be closed: they are when it returns.
        with suppress(ValueError):
            self._frames.close()

    def _count_missing(self, read: int, end_s: float) -> int:
        """Return how many frames were not read, if the video ended clearly before its stated length."""
        if self.total is None or self._length_s is None:
            return 0
        slack_s = max(_MISSING_FRAMES * self._period_s, _MISSING_SHARE * self._length_s)
        return max(self.total - read, 0) if self._length_s - end_s > slack_s else 0


class LiveVideo(Source):
    """A camera or an endless stream: always the newest frame.

    A thread takes every frame, so that none waits in a buffer and gets old.

    Args:
        frames: read and closed in that thread.
        fps: frames per second of the film to write.
        size: (width, height) of that film, in pixels.
        name: what messages call it.
        hang_s: how long nothing may come, neither a frame nor an error; None: for ever.
        ended: set when the reader has left.
    """

    def __init__(
        self,
        frames: Generator[av.VideoFrame, None, None],
        *,
        fps: float,
        size: tuple[int, int],
        name: str = "",
        hang_s: float | None = None,
        ended: threading.Event | None = None,
    ) -> None:
        super().__init__(fps=fps, size=size, live=True, total=None)
        self._name = name
        self._hang_s = hang_s
        self._changed = threading.Condition()
        self._newest: tuple[float, av.VideoFrame] | None = None
        self._ended = ended or threading.Event()
        self._error: OSError | None = None
        # A daemon: a read that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._read, args=(frames,), name="heatlens-camera", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[VideoFrame]:
        start_s = None
        for frame_id in count():
            with self._changed:
                if not self._changed.wait_for(lambda: self._newest is not None or self._ended.is_set(), self._hang_s):
                    raise TimeoutError(errno.ETIMEDOUT, f"gave no frame for {self._hang_s:g} s", self._name)
                newest, self._newest = self._newest, None
            if newest is None:
                break
            taken_s, frame = newest
            start_s = taken_s if start_s is None else start_s
            yield VideoFrame(frame_id, taken_s - start_s, letterbox(_pixels(frame), self.size))
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        with self._changed:
            self._ended.set()
            self._changed.notify_all()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _read(self, frames: Generator[av.VideoFrame, None, None]) -> None:
        try:
            with closing(frames):
                for frame in frames:
                    with self._changed:
                        if self._ended.is_set():
                            break
                        self.lost += self._newest is not None
                        self._newest = (time.monotonic(), frame)
                        self._changed.notify_all()
        except OSError as error:
            self._error = error
        finally:
            with self._changed:
                self._ended.set()
                self._changed.notify_all()


def step_s(before_s: float | None, now_s: float | None, period_s: float) -> float:
    """Return the time from one frame to the next by their timestamps; `period_s` where these are missing or wrong."""
    if before_s is None or now_s is None or not 0 < now_s - before_s <= MAX_STEP_S:
        return period_s
    return now_s - before_s


def _decoded(container: InputContainer, stream: VideoStream, name: str) -> Generator[av.VideoFrame, None, None]:
    """Yield the frames in the order in which they are shown, without those that are damaged; then close the container.

    Raises:
        OSError: reading failed.
    """
    with container, ffmpeg_errors(name, "reading failed: "):
        for packet in container.demux(stream):
            with suppress(av.error.InvalidDataError):
                yield from packet.decode()


def _length_s(container: InputContainer, stream: VideoStream) -> float | None:
    """Return how long the video is, in seconds, without other streams; None if the container does not state it."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    # Matroska keeps it as text.
    tag = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", stream.metadata.get("DURATION", ""))
    if tag:
        hours, minutes, seconds = tag.groups()
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else None


def _size(frame: av.VideoFrame) -> tuple[int, int]:
    """Return (width, height) of the upright frame, in pixels."""
    return (frame.height, frame.width) if _quarter_turns(frame) % 2 else (frame.width, frame.height)


def _pixels(frame: av.VideoFrame) -> UInt8Array:
    """Return the upright frame: uint8 (H, W, 3), RGB."""
    pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
    turns = _quarter_turns(frame)
    return np.ascontiguousarray(np.rot90(pixels, turns)) if turns else pixels


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Return by how many quarter turns, counterclockwise, the frame becomes upright, as phones write it."""
    return round(frame.rotation / 90) % 4
