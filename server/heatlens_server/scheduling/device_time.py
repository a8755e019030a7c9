"""What a device runs, since when, and how long batches and steps take, learned from those that ran."""

import math
from collections.abc import Sequence

from heatlens_server.scheduling.entry import Entry

_NEWEST_WEIGHT = 0.25
"""Weight of the newest batch in the moving average."""

_UNKNOWN_S = 1.0

HANG_FACTOR = 20
"""How many times as long as usual something runs before it counts as hanging."""


class BatchTimeEstimate:
    """An exponential moving average of the running time per batch size. Not thread-safe: its owner's lock guards it."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def add(self, batch_size: int, seconds: float) -> None:
        """Learn from a batch that ran."""
        known = self._seconds.get(batch_size)
        self._seconds[batch_size] = seconds if known is None else known + _NEWEST_WEIGHT * (seconds - known)

    def seconds(self, batch_size: int) -> float:
        """Expected running time, in seconds; 0.0 when nothing is known.

        The time of a size that never ran comes from the nearest size: in proportion from a smaller one, unchanged from
        a larger one, as small batches use a device badly.
        """
        if not self._seconds:
            return 0.0
        known = self._seconds.get(batch_size)
        if known is not None:
            return known
        nearest = min(self._seconds, key=lambda size: abs(size - batch_size))
        return self._seconds[nearest] * max(1.0, batch_size / nearest)

    def images_per_second(self) -> float:
        """The best throughput seen; 0.0 when nothing is known."""
        return max((size / seconds for size, seconds in self._seconds.items() if seconds > 0), default=0.0)


class DeviceTime:
    """Keeps the time of one device. Not thread-safe: its owner's lock guards it. Times are on the owner's clock.

    Attributes:
        index: the device's place in the list of the model's devices.
        batches: how long batches take.
        steps: how long steps take; apart from batches, as a step runs the model on as many rows as it likes.
        step_claimed: whether a step is claimed for this device and has not ended.
        reserved: the entry whose step is claimed for this device and has not begun; None if there is none.
        entries: what it runs.
    """

    def __init__(self, index: int = 0) -> None:
        """Make a device that runs nothing, and of which nothing is known."""
        self.index = index
        self.batches = BatchTimeEstimate()
        self.steps = BatchTimeEstimate()
        self.step_claimed = False
        self.reserved: Entry | None = None
        self.entries: Sequence[Entry] = ()
        self._explanation_s = BatchTimeEstimate()
        self._since: float | None = None
        self._size = 0
        self._step = False

    @property
    def runs(self) -> bool:
        """Whether the device runs something."""
        return self._since is not None

    def start(self, now: float, size: int, *, step: bool, entries: Sequence[Entry] = ()) -> None:
        """The device begins to run a batch of a size, or a step."""
        self._since, self._size, self._step, self.entries = now, size, step, entries

    def finish(self, now: float) -> float:
        """The device is free; how long it ran, in seconds, is learned and returned. 0.0 if nothing ran."""
        if self._since is None:
            return 0.0
        seconds = now - self._since
        self._estimate.add(self._size, seconds)
        self._since, self.entries = None, ()
        return seconds

    def ends_at(self) -> float:
        """When what runs is expected to end; -infinity if nothing runs."""
        return -math.inf if self._since is None else self._since + self._estimate.seconds(self._size)

    def running_s(self, now: float) -> float:
        """How long what runs has been running, in seconds; 0.0 if nothing runs."""
        return 0.0 if self._since is None else now - self._since

    def hangs_s(self, now: float, *, floor_s: float) -> float:
        """How long what runs has been running, in seconds; 0.0 while that is no sign of a hang.

        Args:
            now: on the owner's clock.
            floor_s: what runs for less does not hang, however short it usually is; nor does what runs for less than
                `HANG_FACTOR` times its usual time.
        """
        if self._since is None:
            return 0.0
        running_s = self.running_s(now)
        return running_s if running_s > max(floor_s, HANG_FACTOR * self._estimate.seconds(self._size)) else 0.0

    def learn_explanation(self, seconds: float) -> None:
        """An explanation in steps took so long on the device, all its steps together."""
        self._explanation_s.add(1, seconds)

    def place_s(self, batch_size: int, *, batched: bool, in_steps: bool) -> float:
        """How long until one of the entries that wait leaves the queue, roughly, in seconds; > 0.

        Args:
            batch_size: of a full batch.
            batched: whether some entries wait for a batch: then the next batch makes room.
            in_steps: whether some entries are explained in steps. A batch then waits for a step as well. If no batch is
                to come, the first explanation to end makes room. Several that take turns end later, but as many do.
        """
        if in_steps and not batched:
            return self._explanation_s.seconds(1) or _UNKNOWN_S
        rate = self.batches.images_per_second()
        batch_s = batch_size / rate if rate else _UNKNOWN_S
        return batch_s + (self.steps.seconds(1) if in_steps else 0.0)

    @property
    def _estimate(self) -> BatchTimeEstimate:
        return self.steps if self._step else self.batches
