"""The queue of one model, and the rules that make batches of it.

One owner: every change of an entry's state happens here, under one lock. A batch holds entries of one bucket (equal
`MapSpec`) and is closed when

* it is full, or
* the device is idle: nobody waits for a batch to fill while the device has nothing to do, or
* the device is busy, the oldest entry has waited `max_delay_s`, and the running batch is about to end. Closing earlier
  would gain nothing, since the device cannot take it, and would shut out the images that arrive meanwhile; or
* an entry's deadline, less the time that a batch takes, has come.

Which entries run first is settled by turns (`turns.py`, with the literature):

* Inside a bucket, sources take turns: a batch takes one entry of each, then a second one of each, and the next batch
  goes on where it stopped. A caller with a single image is a source of its own. So a stream with 64 images waiting and
  one with a single image get one each before the first gets its second.
* Buckets take turns as well, a batch each, so that nobody waits for more than one batch of each other bucket. Only the
  bucket whose turn it is may be closed before the running batch is about to end: one that is always full would
  otherwise always be due, and one with few images never. Counting batches, not images, keeps large batches: the
  device's time goes by batches more than by images.
"""

import itertools
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator

from heatlens_server.engines.base import MapSpec, Target
from heatlens_server.errors import DeadlineExpired, QueueFull, ServerDraining
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.serving.entry import Complete, Entry, EntryState, Outcome, Source
from heatlens_server.serving.estimate import BatchTimeEstimate
from heatlens_server.serving.turns import Turns

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
        # In turn order.
        self._buckets: OrderedDict[MapSpec, Turns[Entry]] = OrderedDict()
        self._admitted = 0
        self._callers = 0
        self._waiting = 0
        # No entry's deadline is earlier. Spares most searches for expired ones.
        self._no_expiry_before = math.inf
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
            self._buckets.setdefault(entry.spec, Turns()).put(entry.owner, entry)
            self._waiting += 1
            if entry.deadline is not None:
                self._no_expiry_before = min(self._no_expiry_before, entry.deadline)
            self._changed.notify_all()

    def withdraw(self, entry: Entry) -> bool:
        """Give up an entry's place: its caller cancelled, or its image could not be decoded.

        Returns:
            False if it is too late: a batch has claimed it, or it is gone already.
        """
        with self._changed:
            if entry.state is EntryState.WAITING:
                self._take_out(entry)
            elif entry.state is not EntryState.PREPARING:
                return False
            self._release(entry, EntryState.GONE)
            # Whoever waits for this entry's batch must look again.
            self._changed.notify_all()
            return True

    def take(self) -> list[Entry] | None:
        """Wait until a batch is due and claim it.

        Returns:
            1 to max_batch_size entries of one bucket, in turns; None once the batcher is closed and empty.
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
        spec = next((spec for spec, closing_at in self._closings() if closing_at <= now), None)
        if spec is None:
            return None
        bucket = self._buckets[spec]
        batch = [bucket.take() for _ in range(min(len(bucket), self._max_batch_size))]
        self._waiting -= len(batch)
        for entry in batch:
            self._release(entry, EntryState.CLAIMED)
        self._end_turn(spec)
        return batch

    def _closings(self) -> Iterator[tuple[MapSpec, float]]:
        """Each bucket, in turn order, and when its batch is to be closed, on the clock. Holds the lock."""
        not_before = -math.inf
        for spec, bucket in self._buckets.items():
            if bucket:
                yield spec, max(self._due_at(bucket), not_before)
                # The others let the first one go first, but not at the price of an idle device.
                not_before = self._next_batch_at()

    def _due_at(self, bucket: Turns[Entry]) -> float:
        """When a bucket's batch is to be closed if it is the only one, on the clock. Holds the lock."""
        if self._closed or self._running_since is None or len(bucket) >= self._max_batch_size:
            return -math.inf
        due = max(min(entry.enqueued_at for entry in bucket) + self._max_delay_s, self._next_batch_at())
        deadlines = [entry.deadline for entry in bucket if entry.deadline is not None]
        if deadlines:
            due = min(due, min(deadlines) - self._estimate.seconds(len(bucket)))
        return due

    def _next_batch_at(self) -> float:
        """When the device is about to need a batch, on the clock. Holds the lock."""
        if self._closed or self._running_since is None:
            return -math.inf
        return self._running_since + self._estimate.seconds(self._running_size) - PREPARE_S

    def _end_turn(self, spec: MapSpec) -> None:
        """Put a bucket that gave a batch at the end of the round. Holds the lock."""
        # Those before it that are empty had their turn too.
        for other in list(itertools.takewhile(lambda other: other != spec, self._buckets)):
            if not self._buckets[other]:
                del self._buckets[other]
        if self._buckets[spec]:
            self._buckets.move_to_end(spec)
        else:
            del self._buckets[spec]

    def _seconds_until_due(self) -> float | None:
        """How long nothing will be due unless something changes; None for ever. Holds the lock."""
        dues = [] if self._held() else [closing_at for _, closing_at in self._closings()]
        soonest = min([*dues, self._no_expiry_before])
        # Threads cannot wait for any number of seconds; whoever waits looks again anyway.
        return None if soonest == math.inf else min(max(0.0, soonest - self._clock()), threading.TIMEOUT_MAX)

    def _held(self) -> bool:
        if not self._hold_until:
            return False
        if self._waiting < self._hold_until:
            return True
        self._hold_until = 0
        return False

    def _sweep(self) -> list[Entry]:
        """Take out the entries whose deadline has passed. Holds the lock."""
        now = self._clock()
        if now < self._no_expiry_before:
            return []
        timed = [(e.deadline, e) for bucket in self._buckets.values() for e in bucket if e.deadline is not None]
        expired = [entry for deadline, entry in timed if deadline <= now]
        self._no_expiry_before = min((deadline for deadline, _ in timed if deadline > now), default=math.inf)
        for entry in expired:
            self._take_out(entry)
            self._release(entry, EntryState.GONE)
        return expired

    def _take_out(self, entry: Entry) -> None:
        """Take a waiting entry out of its bucket. Holds the lock."""
        # A stream that replaces a frame by a newer one keeps its turn, and so does its bucket, though they may be empty
        # in between.
        keep_turn = entry.source is not None
        bucket = self._buckets[entry.spec]
        bucket.remove(entry.owner, entry, keep_turn=keep_turn)
        self._waiting -= 1
        if not self._waiting:
            self._buckets.clear()
        elif not bucket and not keep_turn:
            del self._buckets[entry.spec]

    def _release(self, entry: Entry, state: EntryState) -> None:
        entry.state = state
        if state is EntryState.GONE:
            # Nobody wants them; the entry itself may be held for long.
            entry.prepare = entry.image = None
        self._admitted -= 1
        self._callers -= entry.source is None

    def _deliver_expired(self, entries: list[Entry]) -> None:
        if entries:
            error = DeadlineExpired("the deadline passed while the request was waiting for the model")
            self._complete([(entry, error) for entry in entries])
