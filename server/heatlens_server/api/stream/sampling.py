"""Which frames of a stream are explained. Pure: the times come with the frames."""

import math
from dataclasses import dataclass

_SLACK_S = 1e-3
"""How much earlier than its turn a frame may be: timestamps are often whole milliseconds."""


@dataclass(frozen=True, slots=True)
class FrameTime:
    """When a frame was.

    Attributes:
        read_s: when the server read it, on a monotonic clock, in seconds.
        captured_s: when it was captured, on the client's clock, in seconds; None if the client does not tell.
    """

    read_s: float
    captured_s: float | None = None


class FrameSampler:
    """Chooses the first of every `every` frames, and of those at most so many per second.

    Turns come at even intervals, and the first frame since a turn came takes it: frames that jitter are chosen at the
    right rate on average, and in no second more than the limit and one. A turn that no frame took before the next one
    came is lost.
    """

    def __init__(self, *, every: int = 1, max_per_second: float = 0.0) -> None:
        """Choose among frames.

        Args:
            every: >= 1.
            max_per_second: 0.0 for no limit.
        """
        self._every = every
        self._interval_s = 1.0 / max_per_second if max_per_second else 0.0
        self._slack_s = min(_SLACK_S, self._interval_s / 4)
        self._count = 0
        self._until_turn_s = 0.0
        self._last: FrameTime | None = None

    def allows(self, time: FrameTime) -> bool:
        """Whether the next frame is to be explained. To be asked once per frame, in order."""
        self._until_turn_s -= self._since_last_s(time)
        self._last = time
        first_of_many = self._count % self._every == 0
        self._count += 1
        if not first_of_many or self._until_turn_s > self._slack_s:
            return False
        if self._interval_s:
            self._until_turn_s = self._interval_s - math.fmod(-self._until_turn_s, self._interval_s)
        return True

    def _since_last_s(self, time: FrameTime) -> float:
        if self._last is None:
            return 0.0
        if time.captured_s is None or self._last.captured_s is None:
            return time.read_s - self._last.read_s
        # A clock that is set back, or a clip played backwards: time goes on all the same.
        return abs(time.captured_s - self._last.captured_s)
