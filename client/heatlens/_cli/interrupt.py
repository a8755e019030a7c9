"""Handle Ctrl-C and SIGTERM, but not in the middle of a write, which would leave a broken file."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# The exit code that shells report for a command that a signal ended: 128 + SIGINT, 128 + SIGTERM.
INTERRUPTED = 130
TERMINATED = 143


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


# Signal, the handler that it must have, and what it raises.
_SIGNALS: tuple[tuple[signal.Signals, Any, type[KeyboardInterrupt]], ...] = (
    (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    (signal.SIGTERM, signal.SIG_DFL, Terminated),
)


class Interrupts:
    """While entered, SIGINT raises KeyboardInterrupt and SIGTERM Terminated, but inside `held_back` only at its end.

    Leaves a signal alone where it does not end the program anyway: ignored, handled by others, or another thread.
    """

    def __init__(self) -> None:
        self._holding = False
        self._pending: type[KeyboardInterrupt] | None = None
        self._before: list[tuple[signal.Signals, Any]] = []

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number, expected, raised in _SIGNALS:
                if signal.getsignal(number) is expected:
                    self._before.append((number, signal.signal(number, self._handler(raised))))
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        while self._before:
            signal.signal(*self._before.pop())

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Let the block finish, then raise what the first signal meanwhile stands for. Not nested."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            if self._pending is not None:
                pending, self._pending = self._pending, None
                raise pending

    def _handler(self, raised: type[KeyboardInterrupt]) -> Callable[[int, FrameType | None], None]:
        def handle(signal_number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - what `signal` calls
            if not self._holding:
                raise raised
            self._pending = self._pending or raised

        return handle
