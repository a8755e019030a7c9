"""The newest frame of a camera: a thread takes every frame, so that none waits in a driver's buffer and gets old."""

import threading
import time
from collections.abc import Iterator

import cv2
import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.uint8]

# How long `close` waits for a read that is under way. A camera that hangs must not hang the program.
_CLOSE_TIMEOUT_S = 2.0


class LiveVideo:
    """Reads a capture in a thread of its own and keeps only the newest frame.

    Args:
        capture: an open capture; this object owns it from now on.
    """

    def __init__(self, capture: cv2.VideoCapture) -> None:
        self._capture = capture
        self._changed = threading.Condition()
        self._newest: tuple[float, Picture] | None = None
        self._ended = False
        self._missed = 0
        # A daemon: a read that never returns must not keep the process alive.
        self._thread = threading.Thread(target=self._read, name="heatlens-camera", daemon=True)
        self._thread.start()

    @property
    def missed(self) -> int:
        """How many frames were replaced by newer ones before anybody took them."""
        return self._missed

    def __iter__(self) -> Iterator[tuple[float, Picture]]:
        """Yield (seconds of `time.monotonic`, uint8 BGR (H, W, 3)), waiting for frames not seen yet, to the end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                frame, self._newest = self._newest, None
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        """Stop reading and let go of the camera. Idempotent."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_CLOSE_TIMEOUT_S)

    def _read(self) -> None:
        try:
            while not self._ended:
                read, picture = self._capture.read()
                if not read:
                    break
                with self._changed:
                    self._missed += self._newest is not None
                    self._newest = (time.monotonic(), np.asarray(picture, dtype=np.uint8))
                    self._changed.notify_all()
        finally:
            # Here and not in `close`: a capture must not be released while it reads.
            self._capture.release()
            with self._changed:
                self._ended = True
                self._changed.notify_all()
