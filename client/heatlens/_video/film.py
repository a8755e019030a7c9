"""The film that is written: H.264 in an MP4, MOV or MKV file, by PyAV. Needs the extra `video`."""

import errno
import math
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from heatlens._results.images import UInt8Array
from heatlens._video.pyav import ffmpeg_errors

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
_MAX_SIDE_PX = 16_384


class Film:
    """A film being written. It is playable once closed, however few frames it holds.

    A steady film keeps its rate: a frame that comes late is preceded by copies of the one before, and one that comes
    before its time is left out. Other films hold every frame, shown at its time.

    H.264 with 4:2:0 chroma has even sides: an odd one gets a pixel more, a copy of the last.

    Args:
        path: file to write; its suffix names the container.
        fps: frames per second, of a film that is not steady on average.
        size: (width, height) of the frames, in pixels.
        steady: for cameras, whose frames come when they come.

    Raises:
        OSError: the file cannot be written, or H.264 has no films of this size.
    """

    def __init__(self, path: Path, *, fps: float, size: tuple[int, int], steady: bool) -> None:
        if max(size) > _MAX_SIDE_PX:
            why = f"H.264 has no films of {size[0]}x{size[1]} pixels: a side has at most {_MAX_SIDE_PX}"
            raise OSError(errno.EINVAL, why, str(path))
        self._path = path
        self._fps = fps
        self._steady = steady
        self._even_size = size[0] + size[0] % 2, size[1] + size[1] % 2
        self._last: UInt8Array | None = None
        self._written = 0
        self._last_ticks = -1
        self._closed = False
        # faststart: the index first, so that browsers play while they load.
        options = {} if path.suffix.lower() == ".mkv" else {"movflags": "+faststart"}
        rate = Fraction(fps).limit_denominator(_MAX_DENOMINATOR)
        # A clock in which a frame of a steady film lasts a whole number of ticks.
        self._tick_s = Fraction(1, rate.numerator * math.ceil(_TICKS_PER_S / rate.numerator))
        with ffmpeg_errors(str(path)):
            self._container = av.open(f"file:{path}", "w", options=options)
            self._stream = self._container.add_stream("libx264", rate=rate, options=_X264_OPTIONS)
            self._stream.width, self._stream.height = self._even_size
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._tick_s
            self._stream.codec_context.colorspace = _BT601
            self._stream.codec_context.color_range = _LIMITED_RANGE

    def add(self, pixels: UInt8Array, time_s: float) -> None:
        """Show a frame, uint8 (H, W, 3), RGB, at `time_s` seconds, more than the last one's. Raises OSError."""
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

    def close(self) -> None:
        """Finish the file. Idempotent. Raises OSError."""
        if self._closed:
            return
        self._closed = True
        with ffmpeg_errors(str(self._path)):
            if self._written:
                self._container.mux(self._stream.encode(None))
            self._container.close()

    def _write(self, pixels: UInt8Array, time_s: float) -> None:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(_padded(pixels, self._even_size)), format="rgb24")
        self._last_ticks = max(round(time_s / self._tick_s), self._last_ticks + 1)
        frame.pts = self._last_ticks
        frame.time_base = self._tick_s
        with ffmpeg_errors(str(self._path)):
            self._container.mux(self._stream.encode(frame))
        self._written += 1


def _padded(pixels: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Return the pixels with the last column and row repeated up to `size` (width, height)."""
    height_px, width_px = pixels.shape[:2]
    right_px, bottom_px = size[0] - width_px, size[1] - height_px
    if right_px == bottom_px == 0:
        return pixels
    return np.asarray(cv2.copyMakeBorder(pixels, 0, bottom_px, 0, right_px, cv2.BORDER_REPLICATE), dtype=np.uint8)
