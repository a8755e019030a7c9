"""Ctrl-C, but never in the middle of a write: what is half written stays broken."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# What shells say of a command that Ctrl-C ended: 128 + SIGINT.
INTERRUPTED = 130


class Interrupts:
    """While entered, SIGINT raises KeyboardInterrupt, but inside `held_back` only at its end.

    Does nothing where SIGINT does not raise KeyboardInterrupt anyway: ignored, handled by others, or another thread.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the block finish, whatever is pressed, then raise KeyboardInterrupt if it was. Not nested."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._pending:
                self._pending = False
                raise KeyboardInterrupt

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what `signal` calls
        if self._holding:
            self._pending = True
        else:
            raise KeyboardInterrupt
