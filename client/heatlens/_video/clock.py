"""When frames are shown: timestamps of a container that may be missing, broken or jump."""

# A longer step is a broken timestamp and not a pause.
MAX_STEP_S = 600.0


class Clock:
    """The times of a video's frames: its timestamps, where they make sense.

    Args:
        period_s: how long a frame lasts where they do not.
        clock_s: timestamp of the first frame, whose time is 0.
    """

    def __init__(self, period_s: float, clock_s: float) -> None:
        self._period_s = period_s
        self._clock_s = clock_s
        self.time_s = 0.0

    def tick(self, clock_s: float) -> float:
        """Return the next frame's time from its timestamp, in seconds: always more than the last one's."""
        step_s = clock_s - self._clock_s
        # nan compares false with everything.
        self.time_s += step_s if 0 < step_s <= MAX_STEP_S else self._period_s
        self._clock_s = clock_s
        return self.time_s
