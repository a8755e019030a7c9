"""A URL may take its whole timeout to open, inside a library that no signal ends: it is opened in another thread."""

import threading
from collections.abc import Callable
from queue import SimpleQueue

from heatlens._video.source import Source


def opened_aside(open_one: Callable[[], Source]) -> Source:
    """Call `open_one` in a thread of its own and wait for what it returns, or raise what it raises.

    The wait can be interrupted, by KeyboardInterrupt for one. A source that is opened after that is closed again.
    """
    outcome: SimpleQueue[Source | Exception] = SimpleQueue()
    lock = threading.Lock()
    abandoned = threading.Event()

    def run() -> None:
        try:
            opened = open_one()
        except Exception as error:
            outcome.put(error)
            return
        with lock:
            late = abandoned.is_set()
            if not late:
                outcome.put(opened)
        if late:
            opened.close()

    # A daemon: it must not keep the process alive.
    thread = threading.Thread(target=run, name="heatlens-open", daemon=True)
    try:
        thread.start()
        result = outcome.get()
    except BaseException:
        with lock:
            abandoned.set()
            # It came between the interrupt and here.
            last = None if outcome.empty() else outcome.get()
        if last is not None and not isinstance(last, Exception):
            last.close()
        raise
    if isinstance(result, Exception):
        raise result
    return result
