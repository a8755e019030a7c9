"""The end of a server's process: signals, and the last resort when something keeps it from ending."""

import contextlib
import faulthandler
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from heatlens_server.telemetry.output import end_output
from heatlens_server.telemetry.stacks import stacks

_log = logging.getLogger("heatlens")

END_S = 5.0
"""How long the process may take to end once the grace is over or calls are given up, in seconds."""

_NATIVE_S = 2.0
"""How much later it is ended without Python, if a thread keeps the interpreter's lock, in seconds."""

_EXIT_CODE = 1


class ModelHangs(Exception):
    """The server has ended because a model hangs, and the configuration says so."""


class LastResort:
    """Ends the process when it has had its time, whatever runs.

    A thread that waits for nothing but this. Each `tell` starts the clock or puts it forward; it is one write to a
    pipe, so that it can be called where a signal interrupts anything.
    """

    def __init__(self, grace_s: float) -> None:
        """Start the thread.

        Args:
            grace_s: how long calls in flight may take from the first `tell` on, in seconds.
        """
        self._grace_s = grace_s
        self._told, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        threading.Thread(target=self._run, name="last-resort", daemon=True).start()

    def tell(self) -> None:
        """The first time: the process ends within the grace and `END_S`. Later ones: within `END_S` from now."""
        # Full of what was told before.
        with contextlib.suppress(BlockingIOError):
            os.write(self._tell, b"t")

    def _run(self) -> None:
        os.read(self._told, 1)
        left_s = self._grace_s + END_S
        deadline = time.monotonic() + left_s
        while left_s > 0:
            faulthandler.dump_traceback_later(left_s + _NATIVE_S, exit=True)
            if select.select([self._told], [], [], left_s)[0]:
                os.read(self._told, 1)
                deadline = min(deadline, time.monotonic() + END_S)
            left_s = deadline - time.monotonic()
        _log.critical("the server did not end in time and is ended now; its threads:\n%s", stacks())
        end_output()
        os._exit(_EXIT_CODE)


def handle_signals(stop: Callable[[], None], last_resort: LastResort) -> None:
    """Call `stop` at each SIGTERM and SIGINT.

    Args:
        stop: called for each signal, in the main thread, between any two instructions of it: it must do no more than
            wake an event loop.
        last_resort: is told first.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        last_resort.tell()
        stop()

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
