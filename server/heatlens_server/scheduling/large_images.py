"""Large images of all models: few are decoded at a time, their memory is bounded, and small images pass them.

Large is what takes long to decode, or much memory.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Executor

from heatlens_server.core.errors import ImageMemoryFull
from heatlens_server.scheduling.decode_queue import DecodeQueue
from heatlens_server.scheduling.entry import Entry, LargeImage

_RETRY_AFTER_S = 1.0


class LargeImages:
    """Has large images decoded, those of each cost and each owner in turns. Thread-safe."""

    def __init__(self, threads: Executor, *, at_once: int, max_bytes: int) -> None:
        """Start nothing yet.

        Args:
            threads: where to decode; not those of small images, which would wait.
            at_once: most large images decoded at the same time.
            max_bytes: most memory of those that are decoded or wait for it. One is let in whatever it takes.
        """
        self._queue = DecodeQueue(threads, self._decode, at_once=at_once)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._held: dict[Entry, tuple[int, Callable[[Entry], None]]] = {}
        self._running = 0

    @property
    def busy(self) -> bool:
        """Whether one is being decoded: native code, which cannot be interrupted."""
        with self._lock:
            return self._running > 0

    def add(self, entry: Entry, image: LargeImage, decode: Callable[[Entry], None]) -> None:
        """Have an image decoded.

        Args:
            entry: whose image it is.
            image: what it will take.
            decode: decodes the entry; called on one of the threads. Must not raise.

        Raises:
            ImageMemoryFull: it does not fit beside those that are held already.
            RuntimeError: the executor is shut down.
        """
        with self._lock:
            held_bytes = sum(size for size, _ in self._held.values())
            if held_bytes and image.decoded_bytes and held_bytes + image.decoded_bytes > self._max_bytes:
                raise ImageMemoryFull(
                    f"large images that take {held_bytes} bytes are being decoded or wait for it, and this one takes "
                    f"{image.decoded_bytes}; at most {self._max_bytes} are used for them",
                    metadata={"max_decoding_bytes": str(self._max_bytes)},
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._held[entry] = (image.decoded_bytes, decode)
        entry.decode_s = image.decode_s
        try:
            self._queue.add(entry)
        except BaseException:
            self._release(entry)
            raise

    def discard(self, entry: Entry) -> None:
        """Forget an entry; does nothing if it is being decoded or is none of these."""
        if self._queue.discard(entry):
            self._release(entry)

    def _decode(self, entry: Entry) -> None:
        with self._lock:
            decode = self._held[entry][1]
            self._running += 1
        try:
            decode(entry)
        finally:
            with self._lock:
                self._running -= 1
            self._release(entry)

    def _release(self, entry: Entry) -> None:
        with self._lock:
            self._held.pop(entry, None)
