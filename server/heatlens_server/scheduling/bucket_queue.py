"""The entries that wait, in buckets of those that may share a batch. Buckets take turns.

* Inside a bucket, sources take turns (`fair_queue.py`, with the literature): a batch takes one entry of each, then a
  second one of each, and the next batch goes on where it stopped. A caller with a single image is a source of its own.
  So a stream with 64 images waiting and one with a single image get one each before the first gets its second.
* Buckets take turns as well, a batch each, so that an entry waits for one batch of each other bucket at most. Counting
  batches, not images, keeps large batches: the device's time goes by batches more than by images.
* All entries that take steps are one bucket, whatever else they differ in. Its batch is a single step, and its turn
  ends when the step does: batches of entries that come meanwhile go first. So these wait for one step, however many
  entries take steps. Which step is next: see `step_turns.py`.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

from heatlens_server.core.engine import MapSpec
from heatlens_server.scheduling.entry import Entry
from heatlens_server.scheduling.fair_queue import FairQueue
from heatlens_server.scheduling.step_turns import StepTurns

Bucket = tuple[MapSpec, tuple[int, ...], str, int | None]
"""What entries of a batch have in common: the spec, shape and element type of their images, `Entry.batch_most`."""

STEPS: None = None
"""The bucket of entries that take steps."""


class BucketQueue:
    """Entries that wait. Not thread-safe."""

    def __init__(self, *, max_batch_size: int, device_count: int) -> None:
        """Make an empty queue.

        Args:
            max_batch_size: most entries of a batch.
            device_count: how many devices take from it.
        """
        self._max_batch_size = max_batch_size
        # In turn order.
        self._buckets: OrderedDict[Bucket | None, FairQueue[Entry] | StepTurns] = OrderedDict()
        self._steps = StepTurns(device_count=device_count)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """All entries, bucket by bucket."""
        return (entry for bucket in self._buckets.values() for entry in bucket)

    def put(self, entry: Entry) -> None:
        """Add an entry that has its image."""
        key = _bucket_of(entry)
        self._buckets.setdefault(key, self._steps if key is STEPS else FairQueue()).put(entry.owner, entry)
        self._count += 1

    def put_back(self, entry: Entry) -> None:
        """Add an entry that was taken for a step, which has ended, and has further ones: all, if it has no device."""
        if entry.device is None:
            self.put(entry)
            return
        self._buckets.setdefault(STEPS, self._steps)
        self._steps.put_back(entry)
        self._count += 1

    def remove(self, entry: Entry) -> None:
        """Take out an entry that is not to be run any more."""
        # A stream that replaces a frame by a newer one keeps its turn, and its bucket does so too, though both may be
        # empty in between.
        keep_turn = entry.source is not None
        key = _bucket_of(entry)
        bucket = self._buckets[key]
        bucket.remove(entry.owner, entry, keep_turn=keep_turn)
        self._count -= 1
        if not self._count:
            self._buckets.clear()
        elif not bucket and not keep_turn:
            del self._buckets[key]

    def in_turn(self) -> Iterator[tuple[Bucket | None, FairQueue[Entry] | StepTurns]]:
        """The buckets in which entries wait, the next one first."""
        return ((key, bucket) for key, bucket in self._buckets.items() if bucket)

    def most_of(self, key: Bucket | None) -> int:
        """The most entries of a batch of a bucket."""
        return 1 if key is STEPS else key[3] or self._max_batch_size

    def end_step(self, entry: Entry) -> None:
        """The step of an entry that was taken has ended, and with it the turns of its spec and of `STEPS`."""
        self._steps.end_step(entry)
        if STEPS in self._buckets:
            self._buckets.move_to_end(STEPS)

    def has_step(self, device: int) -> bool:
        """Whether the device could run a step of an entry that waits."""
        return self._steps.has_step(device)

    def take(self, key: Bucket | None, device: int) -> list[Entry]:
        """Take a bucket's batch, which ends its turn; or a step for a device: that turn ends with `end_step`."""
        bucket = self._buckets[key]
        if isinstance(bucket, StepTurns):
            batch = [bucket.take(device)]
        else:
            batch = [bucket.take() for _ in range(min(len(bucket), self.most_of(key)))]
        self._count -= len(batch)
        # Empty buckets before it had their turn too.
        for other in list(itertools.takewhile(lambda other: other != key, self._buckets)):
            if not self._buckets[other]:
                del self._buckets[other]
        if bucket:
            self._buckets.move_to_end(key)
        else:
            del self._buckets[key]
        return batch


def _bucket_of(entry: Entry) -> Bucket | None:
    if entry.spec.in_steps:
        return STEPS
    assert entry.image is not None
    return entry.spec, entry.image.pixels.shape, entry.image.pixels.dtype.str, entry.batch_most
