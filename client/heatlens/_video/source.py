"""What all sources of frames have in common, and the simplest one: image files."""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from heatlens._exceptions import InvalidArgumentError
from heatlens._results.images import UInt8Array, decode_image

DEFAULT_FPS = 25.0


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


class Source(ABC):
    """Frames of one size. Iterate once; `close` when done, even in the middle.

    Attributes:
        fps: frames per second of the film to write.
        size: (width, height) of every frame, in pixels.
        live: whether frames come at their own time, and are lost if they are not taken in time.
        total: how many frames there are; None if that is unknown.
        lost: how many frames of a live source were not taken in time.
        missing: how many of `total` frames a damaged source did not hold; 0 until its end.
    """

    def __init__(self, *, fps: float, size: tuple[int, int], live: bool, total: int | None) -> None:
        self.fps = fps
        self.size = size
        self.live = live
        self.total = total
        self.lost = 0
        self.missing = 0

    @abstractmethod
    def __iter__(self) -> Iterator[VideoFrame]:
        """Yield the frames. Raises OSError, which names the source: reading failed."""

    @abstractmethod
    def close(self) -> None:
        """Release the file or camera. Idempotent."""


class Images(Source):
    """Image files, one after the other. The film has the size of the first one that can be read.

    Args:
        paths: image files.
        name: what the user named, for errors.
        fps: frames per second. None: 25.
        on_unreadable: called with every image that cannot be decoded; it is left out.

    Raises:
        FileNotFoundError: no image can be read.
    """

    def __init__(
        self, paths: list[Path], name: str, *, fps: float | None, on_unreadable: Callable[[Path], None]
    ) -> None:
        self._on_unreadable = on_unreadable
        remaining = list(paths)
        first = None
        while remaining and first is None:
            first = self._read(remaining.pop(0))
        if first is None:
            raise FileNotFoundError(errno.ENOENT, "no image there can be read" if paths else "no images there", name)
        self._first = first
        self._others = remaining
        size = (first.shape[1], first.shape[0])
        super().__init__(fps=fps or DEFAULT_FPS, size=size, live=False, total=1 + len(remaining))

    def __iter__(self) -> Iterator[VideoFrame]:
        yield VideoFrame(0, 0.0, self._first)
        frame_id = 1
        for path in self._others:
            pixels = self._read(path)
            if pixels is not None:
                yield VideoFrame(frame_id, frame_id / self.fps, letterbox(pixels, self.size))
                frame_id += 1

    def close(self) -> None:
        """Do nothing: no file stays open."""

    def _read(self, path: Path) -> UInt8Array | None:
        try:
            return decode_image(path)
        except (InvalidArgumentError, OSError):
            self._on_unreadable(path)
            return None


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
