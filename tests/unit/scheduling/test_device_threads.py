"""The threads of a model with two devices: they work at once and apart. The engines are fakes."""

import dataclasses
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from heatlens_server.core.errors import InternalError
from heatlens_server.scheduling.device_threads import ReadyWork
from heatlens_server.scheduling.entry import Progress
from queue_engines import PATIENCE_S, STEPPED, BatchEngine, Rig, StepEngine, eventually, image


@pytest.fixture
def start() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def start(*engines: BatchEngine) -> Rig:
        rigs.append(Rig(*engines, max_batch_size=1))
        rigs[-1].start()
        return rigs[-1]

    yield start
    for rig in rigs:
        for engine in rig.engines:
            engine.gate.set()
            if isinstance(engine, StepEngine):
                engine.run_all()
        rig.stop()


def stuck(device: str = "cuda:0") -> BatchEngine:
    """An engine that is inside of a batch until its gate is opened."""
    engine = BatchEngine(device=device)
    engine.gate.clear()
    return engine


def test_both_devices_work_at_once(start):
    engines = stuck("cuda:0"), stuck("cuda:1")
    rig = start(*engines)
    entries = [rig.put(value) for value in (1, 2)]
    # Not one after the other: a device that is free again would take the second batch, too.
    for engine in engines:
        assert engine.entered.wait(PATIENCE_S)
    for engine in engines:
        engine.gate.set()
    assert [rig.value(entry) for entry in entries] == [1, 2]
    eventually(lambda: len(rig.events) == 4)
    assert sorted(rig.events) == [
        (event, device)
        for event in ("batch of 1 ended, 0 failed", "batch of 1 started")
        for device in ("cuda:0", "cuda:1")
    ]


def test_a_slow_device_does_not_hold_batches_from_the_free_one(start):
    engines = stuck(), stuck()
    rig = start(*engines)
    first = [rig.put(value) for value in (1, 2)]
    for engine in engines:
        assert engine.entered.wait(PATIENCE_S)
    # Two are stacked ahead, and the others wait; nothing is known about either device.
    rest = [rig.put(value) for value in range(10, 20)]
    engines[1].gate.set()
    assert [rig.value(entry) for entry in rest] == list(range(10, 20))
    assert engines[0].seen == []
    assert [batch[0] for batch in engines[1].seen[1:]] == list(range(10, 20))
    engines[0].gate.set()
    assert [rig.value(entry) for entry in first] == [1, 2]


def test_errors_of_one_device_do_not_touch_the_other(start, caplog):
    class Broken(BatchEngine):
        def explain(self, *_args: object) -> list:
            self.entered.set()
            assert self.gate.wait(PATIENCE_S)
            raise RuntimeError("the device is lost")

    broken, whole = Broken(), stuck()
    broken.gate.clear()
    rig = start(broken, whole)
    entries = [rig.put(value) for value in (1, 2)]
    # A device that is free again would take the other one's entry, too.
    for engine in (broken, whole):
        assert engine.entered.wait(PATIENCE_S)
    for engine in (broken, whole):
        engine.gate.set()
    outcomes = [rig.outcome(entry) for entry in entries]
    assert sum(isinstance(outcome, InternalError) for outcome in outcomes) == 1
    assert len(whole.seen) == 1
    assert "the device is lost" in caplog.text


def test_an_explanation_in_steps_stays_on_its_device(start):
    engines = StepEngine(count=20, device="cuda:0"), StepEngine(count=20, device="cuda:1")
    rig = start(*engines)
    entries = [rig.put(value, dataclasses.replace(STEPPED, layers=(str(value % 3),))) for value in range(8)]
    for engine in engines:
        assert engine.inside.acquire(timeout=PATIENCE_S)
        engine.run_all()
    assert [rig.value(entry) for entry in entries] == list(range(8))
    begun = [value for engine in engines for value, _ in engine.begun]
    assert sorted(begun) == list(range(8))
    assert all(engine.begun for engine in engines)


def test_what_is_given_up_is_freed_by_the_thread_of_its_device(start):
    engines = StepEngine(count=1000), StepEngine(count=1000)
    rig = start(*engines)
    entries = [rig.put(value, STEPPED) for value in (1, 2)]
    for engine in engines:
        assert engine.inside.acquire(timeout=PATIENCE_S)
        engine.run_all()
    for entry in entries:
        assert rig.batcher.withdraw(entry)
    eventually(lambda: all(engine.freed_by for engine in engines))
    assert [engine.freed_by for engine in engines] == [["device-m-0"], ["device-m-1"]]


def test_closing_finishes_what_was_admitted_and_ends_both(start):
    engines = stuck(), stuck()
    rig = start(*engines)
    entries = [rig.put(value) for value in range(6)]
    rig.batcher.close()
    assert not rig.join(0.01)
    for engine in engines:
        engine.gate.set()
    assert rig.join(PATIENCE_S)
    assert [rig.value(entry) for entry in entries] == list(range(6))


def test_a_batch_that_cannot_be_stacked_fails_alone(caplog):
    class Unreadable:
        shape = (2, 2, 3)

        def __array__(self, *_args: object, **_kwargs: object) -> np.ndarray:
            raise BufferError("gone")

    rig = Rig(BatchEngine())
    bad = rig.put(1)
    bad.image = dataclasses.replace(image(1), pixels=Unreadable())
    rig.start()
    assert isinstance(rig.outcome(bad), InternalError)
    assert rig.value(rig.put(2)) == 2
    rig.stop()
    assert "could not stack a batch of 1" in caplog.text


def test_work_for_a_device_wakes_it_though_it_is_idle():
    ready = ReadyWork(2)
    found: list[object] = []
    threads = [threading.Thread(target=lambda device=device: found.append(ready.get(device))) for device in (0, 1)]
    for thread in threads:
        thread.start()
    progress = Progress(rows=1, queue_s=0.0, discard=lambda progress: None)
    ready.put(1, progress)
    threads[1].join(PATIENCE_S)
    assert found == [progress]
    ready.close()
    threads[0].join(PATIENCE_S)
    assert found == [progress, None]


def test_threads_are_named_after_the_model():
    rig = Rig(BatchEngine())
    rig.start()
    names = {thread.name for thread in threading.enumerate()}
    assert {"batch-m", "device-m"} <= names
    rig.stop()
