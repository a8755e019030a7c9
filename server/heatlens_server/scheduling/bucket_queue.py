"""Whose turn it is: the entries that wait, by what may share a batch, in turns.

* Inside a bucket, sources take turns (`turns.py`, with the literature): a batch takes one entry of each, then a second
  one of each, and the next batch goes on where it stopped. A caller with a single image is a source of its own. So a
  stream with 64 images waiting and one with a single image get one each before the first gets its second.
* Buckets take turns as well, a batch each, so that nobody waits for more than one batch of each other bucket. Counting
  batches, not images, keeps large batches: the device's time goes by batches more than by images.
* All entries that take steps are one bucket, whatever else they differ in, and its batch is a single step, whose turn
  ends when the step does: others that come meanwhile go first. So they wait for one step, however many of these there
  are. Whose step it is: see `step_turns.py`.
"""

import itertools
from collections import OrderedDict
from collections.abc import Iterator

from heatlens_server.core.engine import MapSpec
from heatlens_server.scheduling.entry import Entry
from heatlens_server.scheduling.fair_queue import FairQueue
from heatlens_server.scheduling.step_turns import StepTurns

Bucket = tuple[MapSpec, tuple[int, ...]]
"""What entries of a batch have in common: the spec and the shape of their images."""

STEPS: None = None
"""The bucket of entries that take steps."""


class BucketQueue:
    """Entries that wait. Not thread-safe."""

    def __init__(self, *, max_batch_size: int) -> None:
        """Nobody waits.

        Args:
            max_batch_size: most entries of a batch.
        """
        self._max_batch_size = max_batch_size
        # In turn order.
        self._buckets: OrderedDict[Bucket | None, FairQueue[Entry] | StepTurns] = OrderedDict()
        self._steps = StepTurns()
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
        """Add an entry that was taken for a step, which has ended, and has further ones."""
        self._buckets.setdefault(STEPS, self._steps)
        self._steps.put_back(entry)
        self._count += 1

    def remove(self, entry: Entry) -> None:
        """Take an entry out that is not to be run any more."""
        # A stream that replaces a frame by a newer one keeps its turn, and so does its bucket, though they may be empty
        # in between.
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
        """The buckets in which somebody waits, the next one first."""
        return ((key, bucket) for key, bucket in self._buckets.items() if bucket)

    def end_step(self, entry: Entry) -> None:
        """An entry's step that was taken has ended, and with it the turns of its spec and of `STEPS`."""
        self._steps.end_step(entry.spec)
        if STEPS in self._buckets:
            self._buckets.move_to_end(STEPS)

    def take(self, key: Bucket | None) -> list[Entry]:
        """Take a bucket's batch. That was its turn; that of `STEPS` lasts until `end_step`."""
        bucket = self._buckets[key]
        batch = [bucket.take() for _ in range(1 if key is STEPS else min(len(bucket), self._max_batch_size))]
        self._count -= len(batch)
        # Those before it that are empty had their turn too.
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
    return entry.spec, entry.image.pixels.shape
