"""Keeping torch's exporters from writing whole graphs to stderr, where the server writes one line per event."""

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def stderr_to_log() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Send what this thread writes to sys.stderr to the log, at level debug. For one thread at a time.

    Handlers that were given the stream before, as the server's are, are not affected.

    Yields:
        A function that calls another one with the real stderr.
    """
    real = sys.stderr
    thread = threading.get_ident()
    with contextlib.redirect_stderr(_Divided(real, thread)):

        def aside(call: Callable[[], None]) -> None:
            with contextlib.redirect_stderr(real):
                call()

        yield aside


class _Divided(io.TextIOBase):
    """A stream that logs one thread's lines and passes on those of others."""

    def __init__(self, real: TextIO, thread: int) -> None:
        self._real = real
        self._thread = thread

    def writable(self) -> bool:
        return True

    def write(self, text: str, /) -> int:
        if threading.get_ident() != self._thread:
            return self._real.write(text)
        if text.strip():
            _log.debug("torch: %s", text.rstrip())
        return len(text)

    def flush(self) -> None:
        self._real.flush()
