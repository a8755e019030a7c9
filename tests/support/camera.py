"""A camera: frames at a fixed rate, whatever becomes of them, and how old their answers are."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import numpy as np


class Camera:
    """`frames` and `frames_async` deliver each image when it is due; a late consumer gets the late ones at once.

    The time of capture is when a frame was due: a consumer that does not take it in time makes it older, not younger.
    """

    def __init__(self, images: list[np.ndarray], *, fps: float, count: int) -> None:
        """Show `images` over and over, `count` frames in all."""
        self._images, self._fps, self._count = images, fps, count
        self._start_s = 0.0

    def frames(self) -> Iterator[np.ndarray]:
        """For threads."""
        self._start_s = time.monotonic()
        for i in range(self._count):
            time.sleep(max(0.0, self.captured_s(i) - time.monotonic()))
            yield self._images[i % len(self._images)]

    async def frames_async(self) -> AsyncIterator[np.ndarray]:
        """For event loops."""
        self._start_s = time.monotonic()
        for i in range(self._count):
            await asyncio.sleep(max(0.0, self.captured_s(i) - time.monotonic()))
            yield self._images[i % len(self._images)]

    def captured_s(self, i: int) -> float:
        """When frame `i` was captured, on the monotonic clock."""
        return self._start_s + i / self._fps

    def age_s(self, i: int) -> float:
        """How old frame `i` is now."""
        return time.monotonic() - self.captured_s(i)
