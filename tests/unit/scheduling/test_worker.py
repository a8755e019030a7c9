"""The device threads, with engines that misbehave on purpose. The engine is the only fake here."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import DeviceOutOfMemory, InternalError
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Entry, Outcome, QueueResult
from heatlens_server.scheduling.worker import Worker

SPEC = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
POISON, NOT_FINITE = 255, 254


def image(value: int) -> FittedImage:
    pixels = np.full((2, 2, 3), value, np.uint8)
    return FittedImage(pixels=pixels, region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2)


class EchoEngine:
    """Answers each image with its own pixel value; fails on POISON; runs out of memory above `memory` images."""

    def __init__(self, memory: int = 100) -> None:
        self.memory = memory
        self.batch_sizes: list[int] = []

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        self.batch_sizes.append(len(images))
        if len(images) > self.memory:
            raise MemoryError
        values = images[:, 0, 0, 0]
        if (values == POISON).any():
            raise ValueError("poison")
        return [
            ImageResult(
                logits=np.array([np.nan if value == NOT_FINITE else value], np.float32),
                class_ids=(0,),
                maps=np.zeros((1, 1, 1), np.float32),
                scales=np.zeros(1, np.float32),
                offsets=np.zeros(1, np.float32),
            )
            for value in values
        ]


class Rig:
    """A worker running on a batcher that waits for `count` entries."""

    def __init__(self, engine: EchoEngine, count: int) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self.done = threading.Event()
        self.count = count
        self.order: list[Entry] = []
        self.failures_to_raise = 0
        self.batcher = Batcher(max_batch_size=8, max_delay_s=0.0, max_queue_length=64, complete=self.complete)
        self.batcher.hold_until(count)
        self.worker = Worker(engine, self.batcher, self.complete, name="echo", step_rows=8)
        self.worker.start()

    def complete(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        for entry, outcome in outcomes:
            self.outcomes[self.order.index(entry)] = outcome
        if len(self.outcomes) == self.count:
            self.done.set()
        if self.failures_to_raise:
            self.failures_to_raise -= 1
            raise RuntimeError("callback failed")

    def run(self, values: Sequence[int]) -> list[Outcome]:
        entries = [self.batcher.admit(TopK(1), SPEC, deadline=None, resolve=lambda outcome: None) for _ in values]
        self.order.extend(entries)
        for entry, value in zip(entries, values, strict=True):
            self.batcher.put(entry, image(value))
        assert self.done.wait(10)
        return [self.outcomes[i] for i in range(len(self.order))]

    def stop(self) -> None:
        self.batcher.close()
        assert self.worker.join(10)


def value_of(outcome: Outcome) -> float:
    assert isinstance(outcome, QueueResult), outcome
    return float(outcome.result.logits[0])


def test_every_entry_gets_its_own_result():
    rig = Rig(EchoEngine(), 8)
    outcomes = rig.run(range(8))
    rig.stop()
    assert [value_of(o) for o in outcomes] == list(range(8))
    assert all(isinstance(o, QueueResult) and o.timing.batch_size == 8 for o in outcomes)


def test_poison_image_fails_alone():
    rig = Rig(EchoEngine(), 8)
    outcomes = rig.run([0, 1, 2, POISON, 4, 5, 6, 7])
    rig.stop()
    assert isinstance(outcomes[3], InternalError)
    assert [value_of(o) for i, o in enumerate(outcomes) if i != 3] == [0, 1, 2, 4, 5, 6, 7]


def test_out_of_memory_halves_until_it_fits():
    engine = EchoEngine(memory=2)
    rig = Rig(engine, 8)
    assert [value_of(o) for o in rig.run(range(8))] == list(range(8))
    rig.stop()
    assert engine.batch_sizes == [8, 4, 2, 2, 4, 2, 2]


def test_out_of_memory_on_one_image_is_said():
    rig = Rig(EchoEngine(memory=0), 2)
    outcomes = rig.run([1, 2])
    rig.stop()
    assert all(isinstance(o, DeviceOutOfMemory) for o in outcomes)


def test_result_that_is_not_finite_fails_alone():
    rig = Rig(EchoEngine(), 3)
    outcomes = rig.run([1, NOT_FINITE, 3])
    rig.stop()
    assert isinstance(outcomes[1], InternalError)
    assert [value_of(outcomes[0]), value_of(outcomes[2])] == [1, 3]


def test_failing_callback_does_not_end_the_loop():
    rig = Rig(EchoEngine(), 1)
    rig.failures_to_raise = 1
    rig.run([1])
    rig.done.clear()
    rig.count = 2
    assert [value_of(o) for o in rig.run([2])] == [1, 2]
    rig.stop()


@pytest.mark.parametrize("values", [[1], [1, POISON]])
def test_worker_ends_when_its_batcher_is_closed(values: list[int]):
    rig = Rig(EchoEngine(), len(values))
    rig.run(values)
    rig.stop()
