"""Where frames go: an MP4 (or MKV, MOV) file, H.264 where PyAV is installed, otherwise what OpenCV can write."""

import errno
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from heatlens._results.images import UInt8Array
from heatlens._video.quiet import silence

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv")
H264, MPEG4 = "H.264", "MPEG-4"
# Visually close to lossless on heat maps over camera pictures, at a speed that two cores keep up with.
# No B-frames: where frames last differently long, FFmpeg's MP4 files with them end before their last frame does.
_X264_OPTIONS = {"crf": "20", "preset": "veryfast", "bf": "0"}
# ITU-T H.264, table E-5: matrix_coefficients 6 is BT.601, which is what swscale makes of RGB unless told otherwise.
# Without the tag, players take HD films for BT.709 and shift the colours.
_BT601, _LIMITED_RANGE = 6, 1
# 30000/1001 and the like, but not the noise of a float.
_MAX_DENOMINATOR = 1001
# The clock of a film, at least: what MPEG counts in.
_TICKS_PER_S = 90_000
# x264's limit.
_MAX_H264_SIDE_PX = 16_384


class Sink(Protocol):
    """A film being written. It is playable once closed, however few frames it holds."""

    codec: str
    # Whether frames may be shown at any time; otherwise each lasts 1 / fps.
    any_time: bool

    def write(self, pixels: UInt8Array, time_s: float) -> None:
        """Append a frame: uint8 (H, W, 3), RGB, of the film's size, shown at `time_s`. Raises OSError."""

    def close(self) -> None:
        """Finish the file. Idempotent. Raises OSError."""


def open_sink(path: Path, *, fps: float, size: tuple[int, int]) -> Sink:
    """Create a film.

    H.264 and MPEG-4 with 4:2:0 chroma have even sides: an odd one gets a pixel more, a copy of the last.

    Args:
        path: file to write; its suffix names the container.
        fps: frames per second, on average.
        size: (width, height) of the frames, in pixels.

    Raises:
        OSError: the file cannot be written, or the codec has no films of this size.
    """
    with_av = importlib.util.find_spec("av") is not None
    if with_av and max(size) > _MAX_H264_SIDE_PX:
        why = f"H.264 has no films of {size[0]}x{size[1]} pixels: a side has at most {_MAX_H264_SIDE_PX}"
        raise OSError(errno.EINVAL, why, str(path))
    # Says why it cannot be written; the libraries only say that.
    with path.open("wb"):
        pass
    if with_av:
        return _PyAvSink(path, fps, size)
    return _OpenCvSink(path, fps, size)


class Film:
    """A sink that is told when each frame is shown.

    A steady film keeps its rate: a frame that comes late is preceded by copies of the one before, and one that comes
    before its time is left out. Other films hold every frame, shown at its time, where the sink can do that.

    Args:
        sink: what writes the frames.
        fps: frames per second of a steady film.
        steady: for cameras, whose frames come when they come.
    """

    def __init__(self, sink: Sink, *, fps: float, steady: bool) -> None:
        self._sink = sink
        self._fps = fps
        self._steady = steady or not sink.any_time
        self._last: UInt8Array | None = None
        self._written = 0

    @property
    def codec(self) -> str:
        """How the film is encoded."""
        return self._sink.codec

    @property
    def written(self) -> int:
        """How many frames the film has."""
        return self._written

    def add(self, pixels: UInt8Array, time_s: float) -> None:
        """Show a frame at `time_s` seconds, more than the last one's. Raises OSError."""
        if not self._steady:
            self._write(pixels, time_s)
            return
        slot = round(time_s * self._fps)
        if slot < self._written:
            return
        held = pixels if self._last is None else self._last
        while self._written < slot:
            self._write(held, self._written / self._fps)
        self._write(pixels, slot / self._fps)
        self._last = pixels

    def _write(self, pixels: UInt8Array, time_s: float) -> None:
        self._sink.write(pixels, time_s)
        self._written += 1

    def close(self) -> None:
        """Finish the file. Idempotent. Raises OSError."""
        self._sink.close()


class _PyAvSink:
    """H.264 by libx264."""

    codec = H264
    any_time = True

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        # Imported late: of all commands only this one needs it, and it is an extra.
        import av  # noqa: PLC0415

        self._path = path
        self._even_size = _even(size)
        self._frame_type = av.VideoFrame
        self._last_ticks = -1
        self._closed = False
        # faststart: the index first, so that browsers play while they load.
        options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
        rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
        # A clock in which a frame of a steady film lasts a whole number of ticks.
        self._tick_s = Fraction(1, rate.numerator * math.ceil(_TICKS_PER_S / rate.numerator))
        with self._telling():
            self._container = av.open(str(path), "w", options=options)
            self._stream = self._container.add_stream("libx264", rate=rate, options=_X264_OPTIONS)
            self._stream.width, self._stream.height = self._even_size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._tick_s
            self._stream.codec_context.colorspace = _BT601
            self._stream.codec_context.color_range = _LIMITED_RANGE

    def write(self, pixels: UInt8Array, time_s: float) -> None:
        frame = self._frame_type.from_ndarray(np.ascontiguousarray(_padded(pixels, self._even_size)), format="rgb24")
        self._last_ticks = max(round(time_s / self._tick_s), self._last_ticks + 1)
        frame.pts = self._last_ticks
        frame.time_base = self._tick_s
        with self._telling():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with self._telling():
            if self._last_ticks >= 0:
                self._container.mux(self._stream.encode(None))
            self._container.close()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Turn FFmpeg's errors, which are of many kinds, into an OSError that names the file."""
        import av.error  # noqa: PLC0415

        try:
            yield
        except av.error.FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None


class _OpenCvSink:
    """H.264 where this OpenCV happens to have an encoder for it, otherwise MPEG-4 part 2, which it always has."""

    any_time = False

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        silence()
        self._even_size = _even(size)
        for fourcc, codec in (("avc1", H264), ("mp4v", MPEG4)):
            code = cv2.VideoWriter.fourcc(*fourcc)
            self._writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, code, fps, self._even_size)
            if self._writer.isOpened():
                self.codec = codec
                return
        raise OSError(errno.EINVAL, f"OpenCV cannot write a video of {size[0]}x{size[1]} pixels here", str(path))

    def write(self, pixels: UInt8Array, time_s: float) -> None:  # noqa: ARG002 - its frames come at its rate
        self._writer.write(cv2.cvtColor(_padded(pixels, self._even_size), cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()


def _even(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] + size[0] % 2, size[1] + size[1] % 2


def _padded(pixels: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Return the pixels with the last column and row repeated up to `size` (width, height)."""
    height_px, width_px = pixels.shape[:2]
    right_px, bottom_px = size[0] - width_px, size[1] - height_px
    if right_px == bottom_px == 0:
        return pixels
    return np.asarray(cv2.copyMakeBorder(pixels, 0, bottom_px, 0, right_px, cv2.BORDER_REPLICATE), dtype=np.uint8)
