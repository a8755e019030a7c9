"""The queue of one model, and the rule that makes batches of it.

One owner: every change of an entry's state happens here, under one lock. A batch holds entries of one bucket (equal
`MapSpec`) and is closed when

* it is full, or
* the device is idle: nobody waits for a batch to fill while the device has nothing to do, or
* the device is busy, the oldest entry has waited `max_delay_s`, and the running batch is about to end. Closing earlier
  would gain nothing, since the device cannot take it, and would shut out the images that arrive meanwhile; or
* an entry's deadline, less the time that a batch takes, has come.

Among buckets that are due, the one whose oldest entry waited longest goes first.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable

from heatlens_server.engines.base import MapSpec, Target
from heatlens_server.errors import DeadlineExpired, QueueFull, ServerDraining
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.serving.entry import Complete, Entry, EntryState, Outcome, Source
from heatlens_server.serving.estimate import BatchTimeEstimate

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
            max_queue_length: most entries admitted and not yet claimed by a batch.
            complete: takes the entries that expired in the queue.
            clock: seconds, monotonic.
        """
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._max_queue_length = max_queue_length
        self._complete = complete
        self._clock = clock
        self._changed = threading.Condition()
        self._buckets: dict[MapSpec, deque[Entry]] = {}
        self._admitted = 0
        self._callers = 0
        self._hold_until = 0
        self._closed = False
        self._running_since: float | None = None
        self._running_size = 0
        self._estimate = BatchTimeEstimate()

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
            ServerDraining: the batcher is closed.
        """
        with self._changed:
            if self._closed:
                raise ServerDraining("the server is shutting down", retry_after_s=_MIN_RETRY_S)
            # A stream is bounded by its own window: its images neither need nor take the places of callers.
            expired = self._sweep() if source is None and self._callers >= self._max_queue_length else []
            full = source is None and self._callers >= self._max_queue_length
            if not full:
                self._admitted += 1
                self._callers += source is None
            rate = self._estimate.images_per_second()
        self._deliver_expired(expired)
        if full:
            wait_s = self._max_batch_size / rate if rate else 1.0
            raise QueueFull(
                f"{self._max_queue_length} requests are waiting already",
                metadata={"max_queue_length": str(self._max_queue_length)},
                retry_after_s=max(_MIN_RETRY_S, wait_s),
            )
        return Entry(target=target, spec=spec, deadline=deadline, resolve=resolve, source=source)

    def put(self, entry: Entry, image: FittedImage) -> None:
        """Queue an admitted entry with its prepared image. Does nothing if it was cancelled meanwhile."""
        with self._changed:
            if entry.state is not EntryState.PREPARING:
                return
            entry.image = image
            entry.enqueued_at = self._clock()
            entry.state = EntryState.WAITING
            self._buckets.setdefault(entry.spec, deque()).append(entry)
            self._changed.notify_all()

    def withdraw(self, entry: Entry) -> bool:
        """Give up an entry's place: its caller cancelled, or its image could not be decoded.

        Returns:
            False if it is too late: a batch has claimed it, or it is gone already.
        """
        with self._changed:
            if entry.state is EntryState.WAITING:
                bucket = self._buckets[entry.spec]
                bucket.remove(entry)
                if not bucket:
                    del self._buckets[entry.spec]
            elif entry.state is not EntryState.PREPARING:
                return False
            self._release(entry, EntryState.GONE)
            # Whoever waits for this entry's batch must look again.
            self._changed.notify_all()
            return True

    def take(self) -> list[Entry] | None:
        """Wait until a batch is due and claim it.

        Returns:
            1 to max_batch_size entries of one bucket, oldest first; None once the batcher is closed and empty.
        """
        while True:
            with self._changed:
                expired = self._sweep()
                batch = None if expired else self._claim_due()
                if not expired and batch is None:
                    if self._closed and not self._admitted:
                        return None
                    self._changed.wait(self._seconds_until_due())
                    continue
            self._deliver_expired(expired)
            if batch:
                return batch

    def device_started(self, batch_size: int) -> None:
        """Tell that the device began to run a batch."""
        with self._changed:
            self._running_since = self._clock()
            self._running_size = batch_size
            self._changed.notify_all()

    def device_finished(self) -> float:
        """Tell that the device is free again; learns how long the batch took and returns it, in seconds."""
        with self._changed:
            if self._running_since is None:
                return 0.0
            seconds = self._clock() - self._running_since
            self._estimate.add(self._running_size, seconds)
            self._running_since = None
            self._changed.notify_all()
            return seconds

    def hold_until(self, count: int) -> None:
        """For tests: make no batch until `count` entries wait in the queue, then go on as usual."""
        with self._changed:
            self._hold_until = count
            self._changed.notify_all()

    def close(self) -> None:
        """Admit nothing more; `take` hands out what is left and then None. Idempotent."""
        with self._changed:
            self._closed = True
            self._hold_until = 0
            self._changed.notify_all()

    def _claim_due(self) -> list[Entry] | None:
        """The batch to run now, or None. Holds the lock."""
        if self._held():
            return None
        now = self._clock()
        due = [bucket for bucket in self._buckets.values() if self._due_at(bucket) <= now]
        if not due:
            return None
        bucket = min(due, key=lambda entries: entries[0].enqueued_at)
        batch = [bucket.popleft() for _ in range(min(len(bucket), self._max_batch_size))]
        if not bucket:
            del self._buckets[batch[0].spec]
        for entry in batch:
            self._release(entry, EntryState.CLAIMED)
        return batch

    def _due_at(self, bucket: deque[Entry]) -> float:
        """When a bucket's batch is to be closed, on the clock. Holds the lock."""
        if self._closed or self._running_since is None or len(bucket) >= self._max_batch_size:
            return -math.inf
        device_free_at = self._running_since + self._estimate.seconds(self._running_size)
        due = max(bucket[0].enqueued_at + self._max_delay_s, device_free_at - PREPARE_S)
        deadlines = [entry.deadline for entry in bucket if entry.deadline is not None]
        if deadlines:
            due = min(due, min(deadlines) - self._estimate.seconds(len(bucket)))
        return due

    def _seconds_until_due(self) -> float | None:
        """How long nothing will be due unless something changes; None for ever. Holds the lock."""
        expiries = [e.deadline for bucket in self._buckets.values() for e in bucket if e.deadline is not None]
        dues = [] if self._held() else [self._due_at(bucket) for bucket in self._buckets.values()]
        soonest = min(dues + expiries, default=math.inf)
        return None if soonest == math.inf else max(0.0, soonest - self._clock())

    def _held(self) -> bool:
        if not self._hold_until:
            return False
        if sum(len(bucket) for bucket in self._buckets.values()) < self._hold_until:
            return True
        self._hold_until = 0
        return False

    def _sweep(self) -> list[Entry]:
        """Take out the entries whose deadline has passed. Holds the lock."""
        now = self._clock()
        expired = [e for b in self._buckets.values() for e in b if e.deadline is not None and e.deadline <= now]
        for entry in expired:
            bucket = self._buckets[entry.spec]
            bucket.remove(entry)
            if not bucket:
                del self._buckets[entry.spec]
            self._release(entry, EntryState.GONE)
        return expired

    def _release(self, entry: Entry, state: EntryState) -> None:
        entry.state = state
        self._admitted -= 1
        self._callers -= entry.source is None

    def _deliver_expired(self, entries: list[Entry]) -> None:
        if entries:
            error = DeadlineExpired("the deadline passed while the request was waiting for the model")
            self._complete([(entry, error) for entry in entries])
