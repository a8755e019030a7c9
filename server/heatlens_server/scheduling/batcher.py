"""The queue of one model, and the rules that make batches of it.

One owner: every change of an entry's state happens here, under one lock. A batch holds entries of one bucket (equal
`MapSpec`, images of equal size) and is closed when

* it is full, or
* the device is idle: nobody waits for a batch to fill while the device has nothing to do, or
* the device is busy, the oldest entry has waited `max_delay_s`, and the running batch is about to end. Closing earlier
  would gain nothing, since the device cannot take it, and would shut out the images that arrive meanwhile; or
* an entry's deadline, less the time that a batch takes, has come.

Which entries run first is settled by turns: see `round.py`. Only the bucket whose turn it is may be closed before the
running batch is about to end: one that is always full would otherwise always be due, and one with few images never.

An entry whose spec is `in_steps` is claimed for one step, alone, and put back until it is done: between two steps it is
an entry that waits, with everything that this means. While one is claimed, no other step is, so that whoever comes
meanwhile goes next.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import DeadlineExpired, QueueFull, ServerDraining
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.bucket_queue import STEPS, Bucket, BucketQueue
from heatlens_server.scheduling.device_time import DeviceTime
from heatlens_server.scheduling.entry import Complete, Entry, EntryState, Outcome, Source
from heatlens_server.scheduling.fair_queue import FairQueue
from heatlens_server.scheduling.step_turns import StepTurns

PREPARE_S = 0.002
"""How long before the running batch ends the next one is closed: time to stack its images, in seconds."""

_MIN_RETRY_S = 0.05


class Batcher:
    """A bounded queue that hands out batches. Thread-safe.

    Every admitted entry is taken in a batch, or delivered an error, or cancelled by its caller: exactly one of these.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_delay_s: float,
        max_queue_length: int,
        complete: Complete,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make an empty queue.

        Args:
            max_batch_size: most images in a batch.
            max_delay_s: how long an image may wait for others while the device is busy, in seconds.
            max_queue_length: most entries admitted and not yet claimed by a batch, those of streams aside.
            complete: takes the entries that expired in the queue.
            clock: seconds, monotonic.
        """
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_queue_length = max_queue_length
        self._complete = complete
        self._clock = clock
        self._changed = threading.Condition()
        self._round = BucketQueue(max_batch_size=max_batch_size)
        self._admitted = 0
        self._callers = 0
        self._callers_in_steps = 0
        # Claimed for a step, and neither put back nor finished yet.
        self._stepping = 0
        # No entry's deadline is earlier. Spares most searches for expired ones.
        self._no_expiry_before = math.inf
        self._hold_until = 0
        self._closed = False
        self._refusal: Exception = ServerDraining()
        self._device = DeviceTime()

    def __len__(self) -> int:
        """Entries admitted and not yet claimed."""
        with self._changed:
            return self._admitted

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
            QueueFull: there is none; with an estimate of when there will be.
            Exception: the batcher is closed: ServerDraining, or what `close` was told.
        """
        with self._changed:
            if self._closed:
                raise self._refusal.with_traceback(None)
            # A stream is bounded by its own window: its images neither need nor take the places of callers.
            expired = self._sweep() if source is None and self._callers >= self._max_queue_length else []
            full = source is None and self._callers >= self._max_queue_length
            entry = Entry(target=target, spec=spec, deadline=deadline, resolve=resolve, source=source)
            if not full:
                self._count(entry, 1)
            wait_s = self._place_s() if full else 0.0
        self._deliver_expired(expired)
        if full:
            raise QueueFull(
                f"{self._max_queue_length} requests are waiting already",
                metadata={"max_queue_length": str(self._max_queue_length)},
                retry_after_s=max(_MIN_RETRY_S, wait_s),
            )
        return entry

    def put(self, entry: Entry, image: FittedImage) -> None:
        """Queue an admitted entry with its prepared image. Does nothing if it was cancelled meanwhile."""
        with self._changed:
            if entry.state is not EntryState.PREPARING:
                return
            entry.image = image
            entry.enqueued_at = self._clock()
            self._round.put(entry)
            self._wait_for(entry)

    def put_back(self, entry: Entry) -> bool:
        """Queue an entry again that was claimed for a step and needs another one. It takes its place in the queue back.

        Returns:
            False if it was given up while the step ran: what is left of it is the caller's to free.
        """
        with self._changed:
            if not self._end_step(entry):
                return False
            self._count(entry, 1)
            self._round.put_back(entry)
            self._wait_for(entry)
            return True

    def finish(self, entry: Entry) -> bool:
        """Tell that an entry that was claimed for a step is done, or has failed.

        Returns:
            False if it was given up while the step ran: nobody is to be told of an outcome.
        """
        with self._changed:
            if not self._end_step(entry):
                return False
            entry.state = EntryState.CLAIMED
            self._device.learn_explanation(entry.stepped_s)
            return True

    def withdraw(self, entry: Entry) -> bool:
        """Give up an entry's place: its caller cancelled, or its image could not be decoded.

        Returns:
            False if it is too late: a batch has claimed it, or it is gone already. One in steps can be given up until
            its last step is done.
        """
        with self._changed:
            if entry.state is EntryState.STEPPING:
                # Whoever runs the step learns of it when that ends.
                _give_up(entry)
                return True
            if entry.state is EntryState.WAITING:
                self._round.remove(entry)
            elif entry.state is not EntryState.PREPARING:
                return False
            self._drop(entry)
            # Whoever waits for this entry's batch must look again.
            self._changed.notify_all()
            return True

    def take(self) -> list[Entry] | None:
        """Wait until a batch is due and claim it.

        Returns:
            1 to max_batch_size entries of one bucket, in turns; or one entry for one of its steps, which is then to be
            given to `put_back` or `finish`; None once the batcher is closed and empty.
        """
        while True:
            with self._changed:
                expired = self._sweep()
                batch = None if expired else self._claim_due()
                if not expired and batch is None:
                    if self._closed and not (self._admitted or self._stepping):
                        return None
                    self._changed.wait(self._seconds_until_due())
                    continue
            self._deliver_expired(expired)
            if batch:
                return batch

    def device_started(self, batch_size: int, *, step: bool = False) -> None:
        """Tell that the device began to run a batch, or a step."""
        with self._changed:
            self._device.start(self._clock(), batch_size, step=step)
            self._changed.notify_all()

    def device_finished(self) -> float:
        """Tell that the device is free again; learns how long that took and returns it, in seconds."""
        with self._changed:
            self._changed.notify_all()
            return self._device.finish(self._clock())

    def hold_until(self, count: int) -> None:
        """For tests: make no batch until `count` entries wait in the queue, then go on as usual."""
        with self._changed:
            self._hold_until = count
            self._changed.notify_all()

    def close(self, refusal: Exception | None = None) -> None:
        """Admit nothing more; `take` hands out what is left and then None. Idempotent.

        Args:
            refusal: what `admit` raises from now on; None for what it would raise anyway.
        """
        with self._changed:
            self._closed = True
            self._refusal = refusal or self._refusal
            self._hold_until = 0
            self._changed.notify_all()

    def _wait_for(self, entry: Entry) -> None:
        """An entry waits from now on. Holds the lock."""
        entry.state = EntryState.WAITING
        if entry.expires_at is not None:
            self._no_expiry_before = min(self._no_expiry_before, entry.expires_at)
        self._changed.notify_all()

    def _end_step(self, entry: Entry) -> bool:
        """An entry's step has ended; False if nobody wants it any more. Holds the lock."""
        self._stepping -= 1
        entry.stepped_s += self._device.step_s(self._clock())
        self._round.end_step(entry)
        self._changed.notify_all()
        return entry.state is EntryState.STEPPING

    def _claim_due(self) -> list[Entry] | None:
        """The batch to run now, or None. Holds the lock."""
        if self._held():
            return None
        now = self._clock()
        for key, closing_at in self._closings():
            if closing_at <= now:
                batch = self._round.take(key)
                for entry in batch:
                    self._count(entry, -1)
                    entry.state = EntryState.STEPPING if key is STEPS else EntryState.CLAIMED
                    entry.begun = True
                self._stepping += key is STEPS
                return batch
        return None

    def _closings(self) -> Iterator[tuple[Bucket | None, float]]:
        """Each bucket, in turn order, and when its batch is to be closed, on the clock. Holds the lock."""
        not_before = -math.inf
        for key, bucket in self._round.in_turn():
            yield key, max(self._due_at(key, bucket), not_before)
            # The others let the first one go first, but not at the price of an idle device.
            not_before = self._next_batch_at()

    def _due_at(self, key: Bucket | None, bucket: FairQueue[Entry] | StepTurns) -> float:
        """When a bucket's batch is to be closed if it is the only one, on the clock. Holds the lock."""
        if key is STEPS and self._stepping:
            return math.inf
        if self._closed or not self._device.runs:
            return -math.inf
        if key is STEPS:
            return math.inf if self._device.runs_step else self._next_batch_at()
        if len(bucket) >= self._max_batch_size:
            return -math.inf
        due = max(min(entry.enqueued_at for entry in bucket) + self._max_delay_s, self._next_batch_at())
        deadlines = [entry.deadline for entry in bucket if entry.deadline is not None]
        if deadlines:
            due = min(due, min(deadlines) - self._device.batches.seconds(len(bucket)))
        return due

    def _next_batch_at(self) -> float:
        """When the device is about to need a batch, on the clock. Holds the lock."""
        return -math.inf if self._closed else self._device.ends_at() - PREPARE_S

    def _seconds_until_due(self) -> float | None:
        """How long nothing will be due unless something changes; None for ever. Holds the lock."""
        dues = [] if self._held() else [closing_at for _, closing_at in self._closings()]
        soonest = min([*dues, self._no_expiry_before])
        # Threads cannot wait for any number of seconds; whoever waits looks again anyway.
        return None if soonest == math.inf else min(max(0.0, soonest - self._clock()), threading.TIMEOUT_MAX)

    def _held(self) -> bool:
        if not self._hold_until:
            return False
        if len(self._round) < self._hold_until:
            return True
        self._hold_until = 0
        return False

    def _sweep(self) -> list[Entry]:
        """Take out the entries whose deadline has passed. Holds the lock."""
        now = self._clock()
        if now < self._no_expiry_before:
            return []
        timed = [(entry.expires_at, entry) for entry in self._round if entry.expires_at is not None]
        expired = [entry for expires_at, entry in timed if expires_at <= now]
        self._no_expiry_before = min((expires_at for expires_at, _ in timed if expires_at > now), default=math.inf)
        for entry in expired:
            self._round.remove(entry)
            self._drop(entry)
        return expired

    def _place_s(self) -> float:
        """When there will be a place for a caller, roughly, in seconds from now. Holds the lock."""
        in_steps = self._callers_in_steps
        return self._device.place_s(self._max_batch_size, batched=self._callers > in_steps, in_steps=in_steps > 0)

    def _count(self, entry: Entry, places: int) -> None:
        """An entry takes its place in the queue, 1, or leaves it, -1. Holds the lock."""
        self._admitted += places
        if entry.source is None:
            self._callers += places
            self._callers_in_steps += places * entry.spec.in_steps

    def _drop(self, entry: Entry) -> None:
        """Give up an entry that no thread is at. Holds the lock."""
        self._count(entry, -1)
        _give_up(entry)
        if entry.steps is not None:
            entry.steps.discard(entry.steps)
            entry.steps = None

    def _deliver_expired(self, entries: list[Entry]) -> None:
        if entries:
            self._complete([(entry, _expired(entry)) for entry in entries])


def _give_up(entry: Entry) -> None:
    entry.state = EntryState.GONE
    # Nobody wants them; the entry itself may be held for long.
    entry.prepare = entry.complete = entry.image = None


def _expired(entry: Entry) -> DeadlineExpired:
    if entry.begun:
        return DeadlineExpired("the deadline passed before the last step of the explanation was done")
    return DeadlineExpired("the deadline passed while the request was waiting for the model")
