"""The device thread and explanations in steps: what they give, how they fail, who frees what they hold."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.errors import DeviceOutOfMemory, InternalError
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling import stepper
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Entry, EntryState, Outcome, QueueResult
from heatlens_server.scheduling.worker import Worker

SPEC = MapSpec(Method.SCORE_CAM, ("layer",), upsample=False)
BATCHED = dataclasses.replace(SPEC, method=Method.GRAD_CAM)
ROWS = 8
PATIENCE_S = 20
POISON, NOT_FINITE, STUBBORN = 255, 254, 253


def image(value: int) -> FittedImage:
    pixels = np.full((2, 2, 3), value, np.uint8)
    pixels.flags.writeable = False  # as those that came in a request
    return FittedImage(pixels=pixels, region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2)


def result(value: float) -> ImageResult:
    one = np.zeros(1, np.float32)
    return ImageResult(np.array([value], np.float32), (0,), np.zeros((1, 1, 1), np.float32), one, one)


class SteppingEngine:
    """Answers each image with its own value after `count` steps; each waits for the gate.

    POISON fails in its second step, STUBBORN when it is given up. More than `memory` rows are out of memory, in the
    second step too.
    """

    def __init__(self, count: int = 3, memory: int = 100) -> None:
        self.count, self.memory = count, memory
        self.gate, self.inside = threading.Semaphore(0), threading.Semaphore(0)
        self.running = 0
        self.live = 0
        self.begun: list[tuple[int, int]] = []
        self.closed_by: list[str] = []

    def explain(self, images: np.ndarray, targets: list[Target], spec: MapSpec) -> list[ImageResult]:
        return [result(value) for value in images[:, 0, 0, 0]]

    def steps(self, pixels: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        assert pixels.flags.writeable
        value = int(pixels[0, 0, 0])
        self.begun.append((value, rows))
        self.live += 1
        try:
            for i in range(self.count):
                self._run()
                if i and value == POISON:
                    raise ValueError("secret")
                if i and rows > self.memory:
                    raise MemoryError
                yield
            self._run()
            return result(np.nan if value == NOT_FINITE else value)
        except GeneratorExit:
            assert not self.running
            self.closed_by.append(threading.current_thread().name)
            if value == STUBBORN:
                raise RuntimeError("cannot be given up") from None
            raise
        finally:
            self.live -= 1

    def _run(self) -> None:
        self.running += 1
        self.inside.release()
        assert self.gate.acquire(timeout=PATIENCE_S)
        self.running -= 1


class Rig:
    """A worker whose steps run when told."""

    def __init__(self, engine: SteppingEngine) -> None:
        self.engine = engine
        self.outcomes: dict[Entry, Outcome] = {}
        self.done = threading.Condition()
        self.batcher = Batcher(max_batch_size=ROWS, max_delay_s=0.0, max_queue_length=64, complete=self.complete)
        self.worker = Worker(engine, self.batcher, self.complete, name="m", step_rows=ROWS)
        self.worker.start()

    def complete(self, outcomes: list[tuple[Entry, Outcome]]) -> None:
        with self.done:
            assert not self.outcomes.keys() & {entry for entry, _ in outcomes}
            self.outcomes.update(outcomes)
            self.done.notify_all()

    def put(self, value: int, spec: MapSpec = SPEC) -> Entry:
        entry = self.batcher.admit(TopK(1), spec, deadline=None, resolve=lambda outcome: None)
        self.batcher.put(entry, image(value))
        return entry

    def enter(self) -> None:
        """Wait until a step is in the engine."""
        assert self.engine.inside.acquire(timeout=PATIENCE_S)

    def step(self) -> None:
        """Let one step go, and wait until the next one is in the engine."""
        self.engine.gate.release()
        self.enter()

    def run(self) -> None:
        """Let all steps go."""
        self.engine.gate.release(1000)

    def outcome(self, entry: Entry) -> Outcome:
        with self.done:
            assert self.done.wait_for(lambda: entry in self.outcomes, PATIENCE_S)
        return self.outcomes[entry]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the device thread."""
        deadline = threading.Event()
        for _ in range(PATIENCE_S * 1000):
            if condition():
                return
            deadline.wait(0.001)
        pytest.fail("it did not happen")

    def stop(self) -> None:
        self.run()
        self.batcher.close()
        assert self.worker.join(PATIENCE_S)
        assert self.engine.live == 0


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def make(**options: int) -> Rig:
        rigs.append(Rig(SteppingEngine(**options)))
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.stop()


def value_of(outcome: Outcome) -> float:
    assert isinstance(outcome, QueueResult), outcome
    return float(outcome.result.logits[0])


def test_each_gets_its_own_result_after_its_steps(make):
    rig = make()
    rig.batcher.hold_until(3)
    entries = [rig.put(value) for value in (7, 8, 9)]
    rig.enter()
    assert [entry.steps is not None for entry in entries] == [True, False, False]
    rig.run()
    assert [value_of(rig.outcome(entry)) for entry in entries] == [7, 8, 9]
    assert rig.engine.begun == [(7, ROWS), (8, ROWS), (9, ROWS)]
    for entry in entries:
        completed = rig.outcome(entry)
        assert completed.timing.batch_size == 1
        assert completed.timing.compute_s > 0
        assert completed.timing.queue_s >= 0
        assert entry.steps is None
    assert rig.engine.closed_by == []


def test_the_time_is_that_of_the_steps_alone(monkeypatch):
    now = 100.0
    monkeypatch.setattr(stepper, "time", SimpleNamespace(monotonic=lambda: now))

    class TimedEngine:
        def steps(self, pixels: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
            nonlocal now
            for seconds in (1.0, 2.0, 4.0):
                now += seconds
                if seconds < 4.0:
                    yield
            return result(1)

    entry = Entry(TopK(1), SPEC, None, lambda outcome: None, image=image(1), enqueued_at=90.0)
    stepping = stepper.Stepper(TimedEngine(), rows=1, name="m", discard=lambda progress: None)
    assert stepping.advance(entry) is None
    now += 50.0  # others have the device
    assert stepping.advance(entry) is None
    now += 50.0
    completed = stepping.advance(entry)
    assert isinstance(completed, QueueResult)
    assert (completed.timing.queue_s, completed.timing.compute_s) == (10.0, 7.0)


def test_a_batch_runs_between_two_steps(make):
    rig = make()
    slow = rig.put(1)
    rig.enter()
    fast = rig.put(2, BATCHED)
    rig.step()
    assert value_of(rig.outcomes[fast]) == 2
    assert slow.state is EntryState.STEPPING
    rig.run()
    assert value_of(rig.outcome(slow)) == 1


def test_cancelled_during_a_step_is_freed_by_the_device_thread_at_its_end(make):
    rig = make()
    entry = rig.put(1)
    rig.enter()
    rig.step()
    assert rig.batcher.withdraw(entry)
    assert rig.engine.live == 1
    rig.engine.gate.release()
    rig.until(lambda: rig.engine.live == 0)
    assert rig.engine.closed_by == ["device-m"]
    rig.until(lambda: entry.steps is None)
    assert len(rig.batcher) == 0
    rig.run()
    assert value_of(rig.outcome(rig.put(2))) == 2
    assert entry not in rig.outcomes


def test_cancelled_between_two_steps_is_freed_by_the_device_thread_though_it_is_idle(make):
    rig = make()
    entry = rig.put(1)
    rig.enter()
    rig.batcher.hold_until(9)
    rig.engine.gate.release()
    rig.until(lambda: entry.state is EntryState.WAITING)
    assert rig.engine.live == 1
    assert rig.batcher.withdraw(entry)
    rig.until(lambda: rig.engine.live == 0)
    assert rig.engine.closed_by == ["device-m"]


def test_cancelled_before_its_first_step_is_never_begun(make):
    rig = make()
    first, second = rig.put(1), rig.put(2)
    rig.enter()
    assert rig.batcher.withdraw(second)
    rig.run()
    assert value_of(rig.outcome(first)) == 1
    assert rig.engine.begun == [(1, ROWS)]


@pytest.mark.parametrize(("value", "error"), [(POISON, InternalError), (NOT_FINITE, InternalError)])
def test_one_that_fails_fails_alone(make, value, error):
    rig = make()
    rig.batcher.hold_until(3)
    entries = [rig.put(value) for value in (1, value, 3)]
    rig.run()
    assert isinstance(rig.outcome(entries[1]), error)
    assert [value_of(rig.outcome(entry)) for entry in (entries[0], entries[2])] == [1, 3]
    assert rig.engine.live == 0


def test_out_of_memory_begins_anew_with_half_the_rows(make):
    rig = make(memory=2)
    entry = rig.put(5)
    rig.run()
    assert value_of(rig.outcome(entry)) == 5
    assert rig.engine.begun == [(5, 8), (5, 4), (5, 2)]


def test_out_of_memory_with_one_row_is_said(make):
    rig = make(memory=0)
    entry = rig.put(5)
    rig.run()
    assert isinstance(rig.outcome(entry), DeviceOutOfMemory)
    assert [rows for _, rows in rig.engine.begun] == [8, 4, 2, 1]


def test_one_that_cannot_be_given_up_harms_nobody(make, caplog):
    rig = make()
    entry = rig.put(STUBBORN)
    rig.enter()
    rig.step()
    assert rig.batcher.withdraw(entry)
    rig.run()
    assert value_of(rig.outcome(rig.put(2))) == 2
    assert "could not be given up cleanly" in caplog.text


def test_what_is_half_done_at_the_end_is_finished(make):
    rig = make()
    entries = [rig.put(value) for value in (1, 2)]
    rig.enter()
    rig.batcher.close()
    rig.run()
    assert rig.worker.join(PATIENCE_S)
    assert [value_of(rig.outcome(entry)) for entry in entries] == [1, 2]


def test_what_is_given_up_at_the_end_is_freed(make):
    rig = make(count=1000)
    # Of one spec, one would be begun.
    entries = [rig.put(value, dataclasses.replace(SPEC, layers=(str(value),))) for value in (1, 2, 3)]
    rig.enter()
    for _ in range(5):
        rig.step()
    rig.batcher.close()
    for entry in entries:
        assert rig.batcher.withdraw(entry)
    rig.run()
    assert rig.worker.join(PATIENCE_S)
    assert rig.engine.closed_by == ["device-m"] * 3
