"""A device and explanations in steps: what they give, how they fail, which thread frees what they hold."""

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.errors import DeviceOutOfMemory, InternalError
from heatlens_server.core.events import Observer
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.device import Device
from heatlens_server.scheduling.entry import Entry, EntryState, Outcome, QueueResult
from heatlens_server.scheduling.pace import ALONE_S, STEP_S
from queue_engines import (
    BATCHED,
    NOT_FINITE,
    PATIENCE_S,
    POISON,
    STEPPED,
    STUBBORN,
    Rig,
    StepEngine,
    eventually,
    image,
    result,
)

ROWS = 8


class StepRig(Rig):
    """One device whose steps run when told."""

    def __init__(self, engine: StepEngine) -> None:
        super().__init__(engine, max_batch_size=ROWS)
        self.engine = engine

    def put(self, value: int, spec: MapSpec = STEPPED) -> Entry:
        return super().put(value, spec)

    def enter(self) -> None:
        """Wait until a step is in the engine."""
        assert self.engine.inside.acquire(timeout=PATIENCE_S)

    def step(self) -> None:
        """Let one step go, and wait until the next one is in the engine."""
        self.engine.permits.release()
        self.enter()


@pytest.fixture
def make() -> Iterator[Callable[..., StepRig]]:
    rigs: list[StepRig] = []

    def make(**options: int) -> StepRig:
        rigs.append(StepRig(StepEngine(**options)))
        rigs[-1].start()
        return rigs[-1]

    yield make
    for rig in rigs:
        rig.engine.run_all()
        rig.stop()
        assert rig.engine.live == 0


def test_each_gets_its_own_result_after_its_steps(make):
    rig = make()
    entries = [rig.put(value) for value in (7, 8, 9)]
    rig.enter()
    assert [entry.steps is not None for entry in entries] == [True, False, False]
    rig.engine.run_all()
    assert [rig.value(entry) for entry in entries] == [7, 8, 9]
    assert rig.engine.begun == [(7, ROWS), (8, ROWS), (9, ROWS)]
    for entry in entries:
        timing = rig.outcome(entry).timing
        assert timing.batch_size == 1
        assert timing.compute_s > 0
        assert timing.queue_s >= 0
        assert entry.steps is None
    assert rig.engine.freed_by == []
    eventually(lambda: rig.events == [("step ended", "cpu")] * 12)


class Timed:
    """A device with a fake clock, and an engine whose runs take `runs_s`, each in its turn."""

    def __init__(self, *runs_s: float) -> None:
        self.now = 90.0
        self.info = SimpleNamespace(device="cpu")
        self.runs_s = runs_s
        self.ran = 0
        self.then: Callable[[], None] = lambda: None
        self.outcomes: list[tuple[Entry, Outcome]] = []
        self.batcher = Batcher(
            max_batch_size=4, max_delay_s=0.0, max_queue_length=9, deliver=self.outcomes.extend, clock=lambda: self.now
        )
        self.device = Device(
            self,
            self.batcher,
            index=0,
            model="m",
            step_rows=4,
            deliver=self.outcomes.extend,
            discard=lambda progress: None,
            hand_back=lambda batch: None,
            try_out=lambda engine: None,
            name="cpu",
            observer=Observer(),
            clock=lambda: self.now,
        )

    def steps(self, pixels: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        self.rows = rows
        for left, seconds in enumerate(reversed(self.runs_s)):
            self.now += seconds
            self.ran += 1
            self.then()
            if left + 1 < len(self.runs_s):
                yield
        return result(1)

    def put(self, spec: MapSpec = STEPPED, *, timeout_s: float | None = None, count: int = 1) -> Entry:
        deadline = None if timeout_s is None else self.now + timeout_s
        entry = self.batcher.admit(TopK(count), spec, deadline=deadline, resolve=lambda outcome: None)
        self.batcher.put(entry, image(1))
        return entry

    def step(self) -> int:
        """Run a step; how many runs it was."""
        before = self.ran
        self.device.run_step(self.batcher.claim()[0])
        return self.ran - before


def test_the_time_is_that_of_the_steps_alone():
    at = Timed(4.0, 2.0, 1.0)
    at.put()
    at.now += 10.0
    for _ in range(3):
        assert at.step() == 1
        at.now += 50.0  # others have the device
    ((_, outcome),) = at.outcomes
    assert isinstance(outcome, QueueResult)
    assert (outcome.timing.queue_s, outcome.timing.compute_s) == (10.0, 7.0)


def test_a_step_is_as_many_runs_as_there_is_time_for():
    at = Timed(*[STEP_S / 4.5] * 100)
    entry, other = at.put(), at.put(dataclasses.replace(STEPPED, layers=("other",)))
    assert at.step() == 4
    assert at.batcher.withdraw(other)
    assert at.step() == int(4.5 * ALONE_S / STEP_S)
    assert entry.state is EntryState.WAITING


def test_a_run_that_takes_longer_is_a_step():
    at = Timed(*[2 * STEP_S] * 100)
    at.put()
    at.put()
    assert at.step() == 1


def test_a_step_ends_soon_after_others_come():
    at = Timed(*[STEP_S / 4.5] * 100)
    at.put()

    def come() -> None:
        if at.ran == 10:
            at.put(BATCHED)

    at.then = come
    assert at.step() == 10


@pytest.mark.parametrize("leave", ["cancelled", "late"])
def test_nothing_more_runs_for_a_caller_that_has_left(leave):
    at = Timed(*[STEP_S / 4.5] * 100)
    entry = at.put(timeout_s=STEP_S if leave == "late" else None)

    def cancel() -> None:
        if leave == "cancelled" and at.ran == 5:
            at.batcher.withdraw(entry)

    at.then = cancel
    assert at.step() == 5
    at.batcher.claim()
    assert entry.state is EntryState.GONE


def test_goals_are_explained_together_once_it_is_known_that_they_take_no_time():
    at = Timed(STEP_S, *[STEP_S / 9.5] * 3, 0.0)
    several = dataclasses.replace(BATCHED, divisible=True)
    entry = at.put(several, count=4)
    assert entry.spec.by_goal
    at.step()
    assert isinstance(at.outcomes[0][1], QueueResult)
    assert not at.put(several, count=9).spec.by_goal
    assert at.put(several, count=10).spec.by_goal


def test_the_rows_of_a_step_are_learned():
    at = Timed(*[STEP_S / 2.5] * 5)
    at.put()
    at.step()
    assert (at.rows, len(at.outcomes)) == (1, 1)
    at.put()
    at.step()
    assert at.rows == 2


def test_a_batch_runs_between_two_steps(make):
    rig = make()
    slow = rig.put(1)
    rig.enter()
    fast = rig.put(2, BATCHED)
    rig.step()
    assert rig.value(fast) == 2
    assert slow.state is EntryState.STEPPING
    rig.engine.run_all()
    assert rig.value(slow) == 1


def test_cancelled_during_a_step_is_freed_by_the_device_thread_at_its_end(make):
    rig = make()
    entry = rig.put(1)
    rig.enter()
    rig.step()
    assert rig.batcher.withdraw(entry)
    assert rig.engine.live == 1
    rig.engine.permits.release()
    eventually(lambda: rig.engine.live == 0)
    assert rig.engine.freed_by == ["device-m"]
    eventually(lambda: entry.steps is None)
    assert len(rig.batcher) == 0
    rig.engine.run_all()
    assert rig.value(rig.put(2)) == 2
    assert entry not in rig.outcomes


def test_cancelled_between_two_steps_is_freed_by_the_device_thread(make):
    rig = make()
    entry, other = rig.put(1), rig.put(2, dataclasses.replace(STEPPED, layers=("other",)))
    rig.enter()
    rig.step()  # the other one has its step, and this one waits
    assert entry.state is EntryState.WAITING
    assert rig.batcher.withdraw(entry)
    assert (entry.state, rig.engine.live) == (EntryState.GONE, 2)
    rig.engine.permits.release()
    eventually(lambda: rig.engine.freed_by == ["device-m"])
    rig.engine.run_all()
    assert rig.value(other) == 2


def test_cancelled_before_its_first_step_is_never_begun(make):
    rig = make()
    first, second = rig.put(1), rig.put(2)
    rig.enter()
    assert rig.batcher.withdraw(second)
    rig.engine.run_all()
    assert rig.value(first) == 1
    assert rig.engine.begun == [(1, ROWS)]


@pytest.mark.parametrize("bad", [POISON, NOT_FINITE])
def test_one_that_fails_fails_alone(make, bad):
    rig = make()
    entries = [rig.put(value) for value in (1, bad, 3)]
    rig.engine.run_all()
    assert isinstance(rig.outcome(entries[1]), InternalError)
    assert [rig.value(entry) for entry in (entries[0], entries[2])] == [1, 3]
    assert rig.engine.live == 0


def test_out_of_memory_begins_anew_with_half_the_rows(make):
    rig = make(memory=2)
    entry = rig.put(5)
    rig.engine.run_all()
    assert rig.value(entry) == 5
    assert rig.engine.begun == [(5, 8), (5, 4), (5, 2)]


def test_out_of_memory_with_one_row_is_said(make):
    rig = make(memory=0)
    entry = rig.put(5)
    rig.engine.run_all()
    assert isinstance(rig.outcome(entry), DeviceOutOfMemory)
    assert [rows for _, rows in rig.engine.begun] == [8, 4, 2, 1]


def test_one_that_cannot_be_given_up_harms_no_other(make, caplog):
    rig = make()
    entry = rig.put(STUBBORN)
    rig.enter()
    rig.step()
    assert rig.batcher.withdraw(entry)
    rig.engine.run_all()
    assert rig.value(rig.put(2)) == 2
    assert "could not be given up cleanly" in caplog.text


def test_what_is_half_done_at_the_end_is_finished(make):
    rig = make()
    entries = [rig.put(value) for value in (1, 2)]
    rig.enter()
    rig.batcher.close()
    rig.engine.run_all()
    assert rig.join(PATIENCE_S)
    assert [rig.value(entry) for entry in entries] == [1, 2]


def test_what_is_given_up_at_the_end_is_freed(make):
    rig = make(count=1000)
    # Of one spec, one would be begun.
    entries = [rig.put(value, dataclasses.replace(STEPPED, layers=(str(value),))) for value in (1, 2, 3)]
    rig.enter()
    for _ in range(5):
        rig.step()
    rig.batcher.close()
    for entry in entries:
        assert rig.batcher.withdraw(entry)
    rig.engine.run_all()
    assert rig.join(PATIENCE_S)
    assert rig.engine.freed_by == ["device-m"] * 3
