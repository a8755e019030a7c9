"""A batcher with a fake clock that tests drive by hand, without sleeping."""

import dataclasses

import numpy as np

from heatlens import PixelBox
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Entry, EntryState, Outcome, Source

LAYER = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
OTHER = MapSpec(Method.LAYER_CAM, ("layer",), upsample=False)
STEPPED = MapSpec(Method.SCORE_CAM, ("layer",), upsample=False)
SMOOTHED = dataclasses.replace(LAYER, augment=True)
ABLATION = MapSpec(Method.ABLATION_CAM, ("layer",), upsample=True)
IMAGE = FittedImage(
    pixels=np.zeros((1, 1, 3), np.uint8), region=PixelBox(0, 0, 1, 1), source_width_px=1, source_height_px=1
)


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher under test, its clock and what it delivered."""

    def __init__(self, *, max_batch_size: int = 4, max_delay_s: float = 0.002, max_queue_length: int = 8) -> None:
        self.clock = Clock()
        self.delivered: list[tuple[Entry, Outcome]] = []
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=max_queue_length,
            complete=self.delivered.extend,
            clock=self.clock,
        )

    def admit(self, spec: MapSpec = LAYER, timeout_s: float | None = None, source: Source | None = None) -> Entry:
        """Take a place in the queue."""
        deadline = None if timeout_s is None else self.clock.now + timeout_s
        return self.batcher.admit(TopK(1), spec, deadline=deadline, resolve=lambda outcome: None, source=source)

    def put(
        self,
        spec: MapSpec = LAYER,
        timeout_s: float | None = None,
        source: Source | None = None,
        image: FittedImage = IMAGE,
    ) -> Entry:
        """Admit an image and queue it."""
        entry = self.admit(spec, timeout_s, source)
        self.batcher.put(entry, image)
        return entry

    def due(self) -> list[Entry] | None:
        """The batch that `take` would hand out now, or None where it would wait."""
        with self.batcher._changed:
            assert not self.batcher._sweep()
            return self.batcher._claim_due()

    def run(self, seconds: float, batch_size: int = 1) -> None:
        """Let the device run a batch."""
        self.batcher.device_started(batch_size)
        self.clock.now += seconds
        self.batcher.device_finished()


def stepping(at: Bench) -> Entry:
    """The entry that is claimed for a step now."""
    batch = at.due()
    assert batch is not None
    assert len(batch) == 1
    assert batch[0].state is EntryState.STEPPING
    return batch[0]


def step(at: Bench, seconds: float = 0.1) -> Entry:
    """Claim an entry for a step and run it."""
    entry = stepping(at)
    at.batcher.device_started(1, step=True)
    at.clock.now += seconds
    assert at.batcher.put_back(entry)
    at.batcher.device_finished()
    return entry


def finish(at: Bench, seconds: float = 0.1) -> Entry:
    """Claim an entry for its last step and run it."""
    entry = stepping(at)
    at.batcher.device_started(1, step=True)
    at.clock.now += seconds
    assert at.batcher.finish(entry)
    at.batcher.device_finished()
    return entry
