"""Lines that native code writes to standard error, gRPC's core for one, as log records.

They go through a pipe in place of the descriptor, which a thread reads. Processes that the server starts write there
too; lines of theirs that are JSON already are passed on as they are.
"""

import contextlib
import json
import logging
import os
import re
import threading

from heatlens_server.telemetry.output import QueuedOutput, before_end, standard_error

_STDERR = 2

_ABSL = re.compile(r"([IWEF])\d{4} ")
"""How a line of absl's logging begins, which is gRPC's: its severity, month and day."""

_LEVELS = {"I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR, "F": logging.CRITICAL}

_MOST_BYTES = 64 * 1024
"""How much of a line is waited for before it is told."""

_END_S = 1.0
"""How long lines that are on their way have when the process ends, in seconds."""


def take_native_lines() -> None:
    """Let every line that native code writes to standard error become a log record: call after `queue_output`.

    What is written while the pipe is full is lost, and so is what is written as the process is killed; the stacks that
    `faulthandler` writes are not, as they go where standard error went before.
    """
    stderr = standard_error()
    read, write = os.pipe()
    os.set_blocking(write, False)
    stderr.move(os.dup(_STDERR))
    os.dup2(write, _STDERR)
    os.close(write)
    thread = threading.Thread(target=_tell_all, args=(read, stderr), name="native-lines", daemon=True)
    thread.start()

    def end() -> None:
        # Closes our end of the pipe. Where a child process has one still, the thread goes on.
        os.dup2(stderr.fileno(), _STDERR)
        thread.join(_END_S)

    before_end(end)


def _tell_all(read: int, stderr: QueuedOutput) -> None:
    rest = b""
    while piece := os.read(read, _MOST_BYTES):
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > _MOST_BYTES:
            lines, rest = [*lines, rest], b""
        for line in lines:
            _tell(line, stderr)
    _tell(rest, stderr)


def _tell(line: bytes, stderr: QueuedOutput) -> None:
    text = line.decode(errors="backslashreplace").strip()
    if _is_json(text):
        stderr.write(line + b"\n")
    elif text:
        absl = _ABSL.match(text)
        level = _LEVELS[absl[1]] if absl else logging.WARNING
        logging.getLogger("grpc" if absl else "native").log(level, "%s", text)


def _is_json(text: str) -> bool:
    if text.startswith("{"):
        with contextlib.suppress(ValueError):
            return isinstance(json.loads(text), dict)
    return False
