"""A camera that drops out is opened again, with growing waits, for a while."""

import errno
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TypeVar

Frame = TypeVar("Frame")

# The wait before the first attempt, what each failed attempt multiplies it by, and its limit.
FIRST_WAIT_S, WAIT_GROWTH, LONGEST_WAIT_S = 0.5, 2.0, 8.0


def reconnected(
    frames: Generator[Frame, None, None],
    reopen: Callable[[], Generator[Frame, None, None]],
    *,
    name: str,
    timeout_s: float,
    wait: Callable[[float], bool],
    tell: Callable[[str], None],
    now: Callable[[], float] = time.monotonic,
) -> Generator[Frame, None, None]:
    """Yield frames that have no end: when they end or fail, open their source again, until it gives a frame.

    Args:
        frames: the first ones; they are closed.
        reopen: begins anew; what it returns raises OSError where the source cannot be opened or read.
        name: what messages call the source.
        timeout_s: how long the source is opened again after it dropped out; 0: not at all.
        wait: waits for seconds, and returns whether the reader has left meanwhile.
        tell: told when the source drops out and when it is back, in one line each.
        now: seconds on a clock.

    Raises:
        OSError: the source dropped out and did not come back; `strerror` says why.
    """
    down_since_s: float | None = None
    wait_s = FIRST_WAIT_S
    while True:
        why: OSError = ConnectionAbortedError(errno.ECONNABORTED, "its frames ended", name)
        try:
            with closing(frames):
                for frame in frames:
                    if down_since_s is not None:
                        tell(f"{name}: is back after {now() - down_since_s:.1f} s")
                        down_since_s, wait_s = None, FIRST_WAIT_S
                    yield frame
        except OSError as error:
            why = error
        if down_since_s is None:
            down_since_s = now()
            if timeout_s > 0:
                tell(f"{name}: dropped out: {why.strerror}; it is opened again for {timeout_s:g} s")
        left_s = down_since_s + timeout_s - now()
        if left_s <= 0:
            text = f"dropped out{f' and did not come back within {timeout_s:g} s' if timeout_s else ''}: {why.strerror}"
            raise OSError(why.errno, text, name) from None
        if wait(min(wait_s, left_s)):
            return
        wait_s = min(wait_s * WAIT_GROWTH, LONGEST_WAIT_S)
        frames = reopen()
