"""The queue of one model, and the rules that make batches of it.

Every change of an entry's state happens here, under one lock. A batch holds entries of one bucket (equal `MapSpec`,
images of equal size) and is closed when

* it is full, or
* a device is idle: no entry waits for a batch to fill while a device has nothing to do, or
* all devices are busy, the oldest entry has waited `max_delay_s`, and the first device is about to be free. Closing
  earlier would gain nothing, since no device can take the batch, and would shut out the images that arrive meanwhile;
  or
* an entry's deadline, less the time that a batch takes, has come.

A model has one device or several. A batch belongs to no device until one begins it, so the device that is free first
takes it, whatever was expected. For each device one batch or step at most is claimed ahead of its time.

Buckets take turns: see `bucket_queue.py`. Only the bucket that is first in turn may be closed before a device is about
to be free: a bucket that is always full would otherwise always be due, and one with few images never.

An entry whose spec is `in_steps` is claimed for one step, alone, and put back until it is done: between two steps it
waits like any other entry. The device that runs its first step runs them all. While a step is claimed for a device, no
other one is, so that entries that come meanwhile go next.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import QueueFull, ServerDraining
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.bucket_queue import STEPS, Bucket, BucketQueue
from heatlens_server.scheduling.device_time import DeviceTime
from heatlens_server.scheduling.devices import Devices
from heatlens_server.scheduling.entry import Deliver, Entry, EntryState, Outcome, Source
from heatlens_server.scheduling.fair_queue import FairQueue
from heatlens_server.scheduling.pace import Pace
from heatlens_server.scheduling.step_turns import StepTurns

STACK_S = 0.002
"""How long before a device is free the next batch is closed: time to stack its images, in seconds."""

_MIN_RETRY_S = 0.05


class Batcher:
    """A bounded queue that hands out batches. Thread-safe.

    Every admitted entry is taken in a batch, or delivered an error, or cancelled by its caller: exactly one of these.

    Attributes:
        pace: what runs of the model take, learned by its devices.
        devices: which of them serve.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_delay_s: float,
        max_queue_length: int,
        deliver: Deliver,
        device_count: int = 1,
        on_device: Callable[[int, str], None] = lambda _index, _fault: None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty queue.

        Args:
            max_batch_size: most images in a batch.
            max_delay_s: how long an image may wait for others while all devices are busy, in seconds.
            max_queue_length: most entries admitted and not yet claimed by a batch, those of streams aside.
            deliver: takes the entries that expired in the queue.
            device_count: how many devices run the batches; their indices count from 0.
            on_device: told why a device is taken out or, with "", that it works again; must return at once.
            pace: what runs of the model take; None: nothing is known yet.
            clock: seconds, monotonic.
        """
        self.pace = pace or Pace()
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_queue_length = max_queue_length
        self._deliver = deliver
        self._clock = clock
        self._changed = threading.Condition()
        self._buckets = BucketQueue(max_batch_size=max_batch_size, device_count=device_count)
        self._admitted = 0
        self._callers = 0
        self._callers_in_steps = 0
        # No entry's deadline is earlier. Spares most searches for expired entries.
        self._no_expiry_before = math.inf
        self._closed = False
        self._refusal: Exception = ServerDraining()
        self.devices = Devices(device_count, self._changed, clock, self._begin_anew, on_device)
        # Batches and steps that are claimed, and that no device has begun.
        self._batches_ahead = 0
        self._steps_ahead = 0

    def __len__(self) -> int:
        """Entries admitted and not yet claimed."""
        with self._changed:
            return self._admitted

    @property
    def waiting(self) -> int:
        """Entries that have their image and are not claimed."""
        with self._changed:
            return len(self._buckets)

    @property
    def closed(self) -> bool:
        """Whether the batcher admits nothing more."""
        return self._closed

    def admit(
        self,
        target: Target,
        spec: MapSpec,
        *,
        deadline: float | None,
        resolve: Callable[[Outcome], None],
        source: Source | None = None,
    ) -> Entry:
        """Take a place in the queue, before the image is decoded.

        Raises:
            QueueFull: there is no place; with an estimate of when there will be one.
            Exception: the batcher is closed: ServerDraining, or what `close` was told.
        """
        with self._changed:
            if self._closed:
                raise self._refusal.with_traceback(None)
            # A stream is bounded by its own window: its images neither need nor take the places of callers.
            expired, full = self._no_place() if source is None else ([], None)
            entry = Entry(target=target, spec=spec, deadline=deadline, resolve=resolve, source=source)
            if full is None:
                self._count(entry, 1)
        self._deliver_expired(expired)
        if full is not None:
            raise full
        return entry

    def refusal(self) -> QueueFull | None:
        """What `admit` would raise for want of a place; None if there is one."""
        with self._changed:
            expired, full = self._no_place()
        self._deliver_expired(expired)
        return full

    def put(self, entry: Entry, image: FittedImage) -> None:
        """Queue an admitted entry with its decoded image. Does nothing if it was cancelled meanwhile."""
        with self._changed:
            if entry.state is not EntryState.DECODING:
                return
            entry.image = image
            entry.enqueued_at = self._clock()
            self._count(entry, -1)
            pixel_count, count = image.pixel_count, entry.target.count
            entry.spec = self.pace.divided(entry.spec, pixel_count, count)
            entry.batch_most = self.pace.most_images(entry.spec, pixel_count, count, self._max_batch_size)
            self._count(entry, 1)
            self._buckets.put(entry)
            no_expiry_before = self._no_expiry_before
            self._wait_for(entry)
            (self._changed.notify_all if self._no_expiry_before < no_expiry_before else self._wake)()

    def withdraw(self, entry: Entry) -> bool:
        """Give up an entry's place: its caller cancelled, or its image could not be decoded.

        Returns:
            False if it is too late: a batch has claimed the entry, or it is gone already. An entry in steps can be
            given up until its last step is done.
        """
        with self._changed:
            if entry.state is EntryState.STEPPING:
                # The device that runs the step learns of it when the step ends.
                entry.give_up()
                return True
            if entry.state is EntryState.WAITING:
                self._buckets.remove(entry)
            elif entry.state is not EntryState.DECODING:
                return False
            self._drop(entry)
            # The thread that waits for this entry's batch must look again.
            self._changed.notify_all()
            return True

    def claim(self) -> list[Entry] | None:
        """Claim what is due now, and deliver an error to entries that have expired.

        Returns:
            1 to max_batch_size entries of one bucket, in turns, to be given to `begin`; or one entry for one of its
            steps, with the `device` that is to run it; None if nothing is due.
        """
        with self._changed:
            expired = self._sweep()
            claimed = self._claim_due()
        self._deliver_expired(expired)
        return claimed

    def take(self) -> list[Entry] | None:
        """Wait until something is due and claim it.

        Returns:
            What `claim` returns; None once the batcher is closed and empty.
        """
        while True:
            with self._changed:
                expired, claimed = self._sweep(), self._claim_due()
                if claimed is None and not expired:
                    if self._closed and not (self._admitted or any(device.step_claimed for device in self.devices)):
                        return None
                    self._changed.wait(self.seconds_until_due())
                    continue
            self._deliver_expired(expired)
            if claimed is not None:
                return claimed

    def seconds_until_due(self) -> float | None:
        """How long `claim` has nothing to do unless something changes, in seconds; None for ever."""
        with self._changed:
            soonest = min([self._no_expiry_before, *(closing_at for _, closing_at, _ in self._closings())])
            # Threads cannot wait for any number of seconds; a thread that waits looks again anyway.
            return None if soonest == math.inf else min(max(0.0, soonest - self._clock()), threading.TIMEOUT_MAX)

    def begin(self, device: int, claimed: list[Entry]) -> bool:
        """Tell that a device begins to run what was claimed.

        Returns:
            False if the caller of an entry has left since its step was claimed: the device stays free.
        """
        first = claimed[0]
        step = first.device is not None
        with self._changed:
            if not step:
                self._batches_ahead -= 1
            else:
                self._steps_ahead -= 1
                self.devices[device].reserved = None
                if first.state is EntryState.GONE:
                    self._end_step(first, device)
                    return False
            self.devices[device].start(self._clock(), len(claimed), step=step, entries=claimed)
            self._wake()
            return True

    def drop_batch(self) -> None:
        """Tell that a claimed batch will not be begun."""
        with self._changed:
            self._batches_ahead -= 1
            self._wake()

    def end_batch(self, device: int, *, again: bool = False) -> None:
        """Tell that a device has run its batch and is free; with `again` another one will begin the same batch."""
        with self._changed:
            self._batches_ahead += again
            self.devices[device].finish(self._clock())
            self._wake()

    def goes_on(self, device: int, entry: Entry, run_s: float) -> bool:
        """Whether a device may run more of an entry in the same step. The next run is expected to take `run_s`."""
        with self._changed:
            now = self._clock()
            if entry.state is not EntryState.STEPPING or (entry.expires_at or math.inf) <= now:
                return False
            others_wait = len(self._buckets) > 0 or self._batches_ahead > 0
            return self.devices[device].running_s(now) + run_s <= self.pace.most_s(others_wait=others_wait)

    def put_back(self, device: int, entry: Entry, *, anew: bool = False) -> bool:
        """Tell that a device has run an entry's step and is free; queue the entry for its next step.

        Returns:
            False if the entry was given up while the step ran: the device is to free what is left of it.
        """
        with self._changed:
            if not self._end_step(entry, device):
                return False
            self._count(entry, 1)
            if anew:  # the step has failed, and nothing is kept: another device begins from the start
                entry.device = None
            self._buckets.put_back(entry)
            self._wait_for(entry)
            self._wake()  # again: now an entry waits
            return True

    def finish(self, device: int, entry: Entry) -> bool:
        """Tell that a device has run an entry's last step, or that the step has failed, and is free.

        Returns:
            False if the entry was given up while the step ran: no caller is to be told of an outcome.
        """
        with self._changed:
            if not self._end_step(entry, device):
                return False
            entry.state = EntryState.CLAIMED
            self.devices[device].learn_explanation(entry.stepped_s)
            return True

    def close(self, refusal: Exception | None = None) -> None:
        """Admit nothing more; `take` hands out what is left and then None. Idempotent.

        Args:
            refusal: what `admit` raises from now on; None for what it would raise anyway.
        """
        with self._changed:
            self._closed = True
            self._refusal = refusal or self._refusal
            self._changed.notify_all()

    # All below: the caller holds the lock.

    def _no_place(self) -> tuple[list[Entry], QueueFull | None]:
        """Entries that have expired, if callers take all places, and what is raised if they still do."""
        if self._callers < self._max_queue_length:
            return [], None
        expired = self._sweep()
        if self._callers < self._max_queue_length:
            return expired, None
        return expired, QueueFull(
            f"{self._max_queue_length} requests are waiting already",
            metadata={"max_queue_length": str(self._max_queue_length)},
            retry_after_s=max(
                _MIN_RETRY_S, self.devices.place_s(self._max_batch_size, self._callers, self._callers_in_steps)
            ),
        )

    def _wake(self) -> None:
        """Have `take` look again, if it could find something: not while something is claimed ahead for every device."""
        if self._closed or (len(self._buckets) and self._batches_ahead + self._steps_ahead < len(self.devices)):
            self._changed.notify_all()

    def _wait_for(self, entry: Entry) -> None:
        """An entry waits from now on."""
        entry.state = EntryState.WAITING
        if entry.expires_at is not None:
            self._no_expiry_before = min(self._no_expiry_before, entry.expires_at)

    def _begin_anew(self, device: int) -> None:
        """A device was taken out: others begin the explanations that it has begun."""
        for entry in [entry for entry in self._buckets if entry.device == device]:
            self._buckets.remove(entry)
            self._free(entry)
            entry.device = None
            self._buckets.put_back(entry)

    def _end_step(self, entry: Entry, device: int) -> bool:
        """An entry's step has ended; False if its caller has left."""
        entry.stepped_s += self.devices[device].finish(self._clock())
        self.devices[device].step_claimed = False
        self._buckets.end_step(entry)
        self._wake()
        return entry.state is EntryState.STEPPING

    def _claim_due(self) -> list[Entry] | None:
        """What to run now, or None."""
        now = self._clock()
        for key, closing_at, device in self._closings():
            if closing_at > now:
                continue
            claimed = self._buckets.take(key, device.index)
            for entry in claimed:
                self._count(entry, -1)
                entry.begun = True
                entry.state = EntryState.CLAIMED
            if key is STEPS:
                claimed[0].state, claimed[0].device = EntryState.STEPPING, device.index
                device.step_claimed, device.reserved = True, claimed[0]
                self._steps_ahead += 1
            else:
                self._batches_ahead += 1
            return claimed
        return None

    def _closings(self) -> Iterator[tuple[Bucket | None, float, DeviceTime]]:
        """Each bucket, in turn order, when its batch is to be closed, on the clock, and which device it is due for."""
        if not len(self._buckets):
            return
        free = self.devices.free(self._batches_ahead, closed=self._closed)
        if not free:
            return
        not_before = -math.inf
        for key, bucket in self._buckets.in_turn():
            if isinstance(bucket, StepTurns):
                due_at, device = self._step_due(free)
            else:
                due_at, device = self._batch_due_at(bucket, self._buckets.most_of(key), free[0]), free[0]
            yield key, max(due_at, not_before), device
            # The other buckets let the first one go first, but not at the price of an idle device.
            not_before = self._needed_at(free[0])

    def _step_due(self, free: list[DeviceTime]) -> tuple[float, DeviceTime]:
        """When a step is to be claimed if no batch waits, on the clock, and for which device."""
        for device in free:
            if not device.step_claimed and self._buckets.has_step(device.index):
                return self._needed_at(device), device
        return math.inf, free[0]

    def _batch_due_at(self, bucket: FairQueue[Entry], most: int, device: DeviceTime) -> float:
        """When a bucket's batch is to be closed if it is the only one, on the clock; `device` is free first."""
        if self._closed or not device.runs or len(bucket) >= most:
            return -math.inf
        due = max(min(entry.enqueued_at for entry in bucket) + self._max_delay_s, self._needed_at(device))
        deadlines = [entry.deadline for entry in bucket if entry.deadline is not None]
        if deadlines:
            due = min(due, min(deadlines) - device.batches.seconds(len(bucket)))
        return due

    def _needed_at(self, device: DeviceTime) -> float:
        """When a device is about to need a batch, on the clock."""
        return -math.inf if self._closed else device.ends_at() - STACK_S

    def _sweep(self) -> list[Entry]:
        """Take out the entries whose deadline has passed."""
        now = self._clock()
        if now < self._no_expiry_before:
            return []
        timed = [(entry.expires_at, entry) for entry in self._buckets if entry.expires_at is not None]
        expired = [entry for expires_at, entry in timed if expires_at <= now]
        self._no_expiry_before = min((expires_at for expires_at, _ in timed if expires_at > now), default=math.inf)
        for entry in expired:
            self._buckets.remove(entry)
            self._drop(entry)
        return expired

    def _count(self, entry: Entry, places: int) -> None:
        """An entry takes its place in the queue, 1, or leaves it, -1."""
        self._admitted += places
        if entry.source is None:
            self._callers += places
            self._callers_in_steps += places * entry.spec.in_steps

    def _drop(self, entry: Entry) -> None:
        """Give up an entry that waits."""
        self._count(entry, -1)
        entry.give_up()
        self._free(entry)

    def _free(self, entry: Entry) -> None:
        """Have its device free what is kept of an entry between two of its steps."""
        if entry.steps is not None:
            entry.steps.discard(entry.steps)
            entry.steps = None

    def _deliver_expired(self, entries: list[Entry]) -> None:
        """Give their error to entries that expired. Called without the lock, unlike the methods above."""
        if entries:
            self._deliver([(entry, entry.expiry()) for entry in entries])
