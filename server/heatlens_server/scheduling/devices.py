"""The devices of one model: which of them serve, what each runs, and since when.

A device that fails or hangs is taken out, and the others go on. It is put in again once it works.
"""

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from heatlens_server.scheduling.device_time import DeviceTime
from heatlens_server.scheduling.entry import Entry


@dataclass(frozen=True, slots=True)
class Hanging:
    """A device that was taken out because it hangs.

    Attributes:
        device: its index.
        running_s: for how long it has been running what it runs, in seconds.
        entries: what it runs, and was to run next.
    """

    device: int
    running_s: float
    entries: Sequence[Entry]


class Devices:
    """The devices of one model. Thread-safe; the batcher alone, which holds the lock, iterates over them."""

    def __init__(
        self,
        count: int,
        changed: threading.Condition,
        clock: Callable[[], float],
        on_out: Callable[[int], None],
        on_change: Callable[[int, str], None],
    ) -> None:
        """All serve.

        Args:
            count: how many there are; their indices count from 0.
            changed: the batcher's lock, which is notified when a device is put in or taken out.
            clock: the batcher's: seconds, monotonic.
            on_out: called, under the lock, when a device was taken out.
            on_change: told, under the lock, of a device that was taken out and why, or put in; returns at once.
        """
        self._times = [DeviceTime(index) for index in range(count)]
        # Why a device is out; empty while it serves.
        self._faults = [""] * count
        self._changed = changed
        self._clock = clock
        self._on_out = on_out
        self._on_change = on_change

    def __len__(self) -> int:
        return len(self._times)

    def __iter__(self) -> Iterator[DeviceTime]:
        return iter(self._times)

    def __getitem__(self, index: int) -> DeviceTime:
        return self._times[index]

    @property
    def faults(self) -> tuple[str, ...]:
        """Why each device is out; empty for one that serves."""
        with self._changed:
            return tuple(self._faults)

    def serves(self, index: int) -> bool:
        """Whether a device takes work."""
        return not self._faults[index]

    def take_out(self, index: int, fault: str) -> bool:
        """Give a device no more work. A model's only device is never taken out.

        Returns:
            Whether another one serves.
        """
        if len(self) == 1:
            return False
        with self._changed:
            if self.serves(index):
                self._faults[index] = fault
                self._on_out(index)
                self._on_change(index, fault)
                self._changed.notify_all()
            return not all(self._faults)

    def put_in(self, index: int) -> None:
        """Give a device work again."""
        with self._changed:
            self._faults[index] = ""
            self._on_change(index, "")
            self._changed.notify_all()

    def hangs_s(self, floor_s: float) -> float:
        """How long all devices that serve have been hanging, in seconds: see `DeviceTime.hangs_s`.

        Returns:
            0.0 if one of them does not hang, infinity if none serves.
        """
        with self._changed:
            return min((seconds for _, seconds in self._hanging(floor_s)), default=math.inf)

    def take_out_hanging(self, floor_s: float, *, spared: Collection[int] = ()) -> list[Hanging]:
        """Take out the devices that hang, if that leaves one.

        Args:
            floor_s: see `DeviceTime.hangs_s`.
            spared: devices that are known to be waited for.
        """
        with self._changed:
            found = [(time, seconds) for time, seconds in self._hanging(floor_s) if time.index not in spared]
            hanging = [(time, seconds) for time, seconds in found if seconds]
            if len(hanging) == sum(map(self.serves, range(len(self)))):
                return []
            taken = [
                Hanging(time.index, seconds, [*time.entries, *([time.reserved] if time.reserved else [])])
                for time, seconds in hanging
            ]
            for one in taken:
                self.take_out(one.device, f"what it runs has been running for {one.running_s:.0f} s")
            return taken

    # All below: the caller holds the lock.

    def free(self, ahead: int, *, closed: bool) -> list[DeviceTime]:
        """The devices for which something may be claimed, the one that is free first before the others.

        Args:
            ahead: how many batches are claimed that no device has begun.
            closed: whether the queue is to be emptied, by whatever device there is.
        """
        free = [time for time in self if time.reserved is None and (closed or self.serves(time.index))]
        if len(free) > 1:
            free.sort(key=DeviceTime.ends_at)
        # The devices that are free first take what is ahead.
        return free[ahead:]

    def place_s(self, batch_size: int, callers: int, in_steps: int) -> float:
        """When there will be a place for a caller, roughly, in seconds from now: all devices make places.

        Args:
            batch_size: of a full batch.
            callers: how many wait.
            in_steps: how many of them are explained in steps.
        """
        serving = [time for time in self if self.serves(time.index)] or self._times
        waits = (time.place_s(batch_size, batched=callers > in_steps, in_steps=in_steps > 0) for time in serving)
        return 1 / sum(1 / wait_s for wait_s in waits)

    def _hanging(self, floor_s: float) -> Iterator[tuple[DeviceTime, float]]:
        now = self._clock()
        return ((time, time.hangs_s(now, floor_s=floor_s)) for time in self if self.serves(time.index))
