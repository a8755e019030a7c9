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
_FILLER = dataclasses.replace(LAYER, layers=("filler",))


class Clock:
    """Time that moves when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher under test, its clock and what it delivered."""

    def __init__(
        self, *, max_batch_size: int = 4, max_delay_s: float = 0.002, max_queue_length: int = 8, device_count: int = 1
    ) -> None:
        self.clock = Clock()
        self.delivered: list[tuple[Entry, Outcome]] = []
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=max_queue_length,
            deliver=self.delivered.extend,
            device_count=device_count,
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
        """Claim the batch that is due now; None where `take` would wait."""
        return self.batcher.claim()

    def run(self, claimed: list[Entry], seconds: float = 0.0, device: int = 0) -> list[Entry]:
        """Let a device run a batch that was claimed."""
        assert self.batcher.begin(device, claimed)
        self.clock.now += seconds
        self.batcher.end_batch(device)
        return claimed

    def taken(self) -> list[Entry]:
        """The batch that an idle device takes; it runs in no time."""
        claimed = self.due()
        assert claimed is not None
        return self.run(claimed)

    def occupy(self, size: int = 1, device: int = 0) -> None:
        """Have an idle device begin a batch of so many images. Nothing else may wait."""
        stream = Source()
        for _ in range(size):
            self.put(_FILLER, source=stream)
        batch = self.due()
        assert batch is not None
        assert len(batch) == size
        assert self.batcher.begin(device, batch)

    def learn(self, seconds: float, size: int = 1, device: int = 0) -> None:
        """Let an idle device run a batch, so that its time is known. Nothing else may wait."""
        self.occupy(size, device)
        self.clock.now += seconds
        self.batcher.end_batch(device)


def stepping(at: Bench) -> Entry:
    """The entry that is claimed for a step now, and begun by its device."""
    batch = at.due()
    assert batch is not None
    assert len(batch) == 1
    assert batch[0].state is EntryState.STEPPING
    assert batch[0].device is not None
    assert at.batcher.begin(batch[0].device, batch)
    return batch[0]


def step(at: Bench, seconds: float = 0.1) -> Entry:
    """Claim an entry for a step and run it."""
    entry = stepping(at)
    at.clock.now += seconds
    assert at.batcher.put_back(entry.device, entry)
    return entry


def finish(at: Bench, seconds: float = 0.1) -> Entry:
    """Claim an entry for its last step and run it."""
    entry = stepping(at)
    at.clock.now += seconds
    assert at.batcher.finish(entry.device, entry)
    return entry
