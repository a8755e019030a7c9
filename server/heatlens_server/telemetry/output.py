"""Standard output and standard error of a server, which goes on whether or not anybody reads them.

What is written goes through a bounded queue to a thread that writes it out. While a pipe is full, a disk is full, or
the reader is gone, more than the queue holds is dropped, counted, and said once there is room again.
"""

import atexit
import contextlib
import io
import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

_MAX_WAITING_BYTES = 1024 * 1024
_GATHER_S = 0.01
"""How long the thread rests after it has written, in seconds."""

_END_S = 1.0
"""How long what still waits has to be written when the process ends, in seconds."""

_running: list["QueuedOutput"] = []
_before_end: list[Callable[[], None]] = []


class QueuedOutput(io.RawIOBase):
    """A file whose `write` returns at once. Thread-safe.

    A write that would make more than `max_bytes` wait is dropped as a whole: half a line helps nobody.
    """

    def __init__(self, descriptor: int, name: str, *, max_bytes: int = _MAX_WAITING_BYTES) -> None:
        """Start the thread that writes.

        Args:
            descriptor: an open file descriptor; a copy of it is kept.
            name: what log lines call it.
            max_bytes: the most that waits; a single longer write is let through alone.
        """
        super().__init__()
        self._descriptor = descriptor
        self._target = os.dup(descriptor)
        self._name = name
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._dropped = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"write-{name}", daemon=True)
        self._thread.start()

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return os.isatty(self._target)

    def fileno(self) -> int:
        """The file descriptor that it was made of, for native code that writes to it without the queue."""
        return self._descriptor

    def move(self, descriptor: int) -> None:
        """Have `fileno` return another descriptor of the same file."""
        self._descriptor = descriptor

    def write(self, data: "bytes | bytearray | memoryview[int]", /) -> int:  # type: ignore[override]
        """Queue some bytes, or drop them if too many wait.

        Returns:
            How many there were, in either case.
        """
        data = bytes(data)
        with self._changed:
            # The thread's own line says how many were dropped: it must not be among them.
            is_own = threading.current_thread() is self._thread
            if self._waiting and self._waiting_bytes + len(data) > self._max_bytes and not is_own:
                self._dropped += 1
            else:
                self._waiting.append(data)
                self._waiting_bytes += len(data)
                self._changed.notify()
        return len(data)

    def end(self, timeout_s: float) -> bool:
        """Write what waits, for so many seconds at most, and write nothing afterwards. Idempotent.

        Returns:
            False if the time ran out.
        """
        with self._changed:
            self._ended.set()
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._ended.is_set()):
                    self._changed.wait()
                if not self._waiting:
                    return
                # What is being written still counts as waiting, so that a stuck write does not double the bound.
                pieces = list(self._waiting)
            written = self._write_out(b"".join(pieces))
            with self._changed:
                for piece in pieces:
                    self._waiting.popleft()
                    self._waiting_bytes -= len(piece)
                self._dropped += 0 if written else len(pieces)
                told = self._dropped if written else 0
                self._dropped -= told
            if told:
                _log.warning("%d writes to %s were dropped: nobody read it, or it took no more", told, self._name)
            # Lines come by the hundred under load: one wake-up for many.
            self._ended.wait(_GATHER_S)

    def _write_out(self, data: bytes) -> bool:
        """Write all to the descriptor, however long that takes; False if it takes nothing."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._target, left) :]
            except BlockingIOError:
                # Whoever started the process made the descriptor so.
                select.select([], [self._target], [])
            except OSError:
                return False
        return True


def queue_output() -> None:
    """Let everything that the process writes to standard output and standard error go through queues.

    What native code writes to the descriptors is dropped while they take no more. A descriptor that is closed becomes
    that of /dev/null, so that no socket gets its number.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        output = QueuedOutput(descriptor, name)
        _never_block(descriptor)
        _running.append(output)
        text = io.TextIOWrapper(output, encoding="utf-8", errors="backslashreplace", write_through=True)  # type: ignore[type-var]
        setattr(sys, name, text)
    atexit.register(end_output)


def standard_error() -> QueuedOutput:
    """That of the process; `queue_output` must have been called."""
    return _running[-1]


def before_end(function: Callable[[], None]) -> None:
    """Have something called once, before the last of the output is written."""
    _before_end.append(function)


def end_output() -> None:
    """Write what waits in the queues, within a second each. To be called before `os._exit`."""
    while _before_end:
        _before_end.pop()()
    for output in _running:
        output.end(_END_S)


def _never_block(descriptor: int) -> None:
    """Open a pipe or terminal anew under its own number, so that writes of native code fail rather than wait.

    O_NONBLOCK on the descriptor itself would be seen by every process that shares it.
    """
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        # There may be no /proc, or no right to open it.
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            os.dup2(own, descriptor)
            os.close(own)
