"""What every thread of the process does, for the log."""

import sys
import threading
import traceback


def stacks() -> str:
    """The stack of each thread that runs Python, under its name, the innermost call last.

    No values of variables: those hold callers' images.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)).rstrip()}"
        for ident, frame in sys._current_frames().items()  # noqa: SLF001 - documented
    )
