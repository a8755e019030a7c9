"""A device and explanations in steps: what they give, how they fail, which thread frees what they hold."""

import dataclasses
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.errors import DeviceOutOfMemory, InternalError
from heatlens_server.core.events import Observer
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.device import Device
from heatlens_server.scheduling.entry import Entry, EntryState, Outcome, QueueResult
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


def test_the_time_is_that_of_the_steps_alone():
    now = 90.0

    class TimedEngine:
        info = SimpleNamespace(device="cpu")

        def steps(self, pixels: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
            nonlocal now
            for seconds in (1.0, 2.0, 4.0):
                now += seconds
                if seconds < 4.0:
                    yield
            return result(1)

    def clock() -> float:
        return now

    outcomes: list[tuple[Entry, Outcome]] = []
    batcher = Batcher(max_batch_size=1, max_delay_s=0.0, max_queue_length=1, deliver=lambda expired: None, clock=clock)
    device = Device(
        TimedEngine(),
        batcher,
        index=0,
        model="m",
        step_rows=1,
        deliver=outcomes.extend,
        discard=lambda progress: None,
        observer=Observer(),
        clock=clock,
    )
    entry = batcher.admit(None, STEPPED, deadline=None, resolve=lambda outcome: None)
    batcher.put(entry, image(1))
    now += 10.0
    for _ in range(3):
        device.run_step(batcher.claim()[0])
        now += 50.0  # others have the device
    ((_, outcome),) = outcomes
    assert isinstance(outcome, QueueResult)
    assert (outcome.timing.queue_s, outcome.timing.compute_s) == (10.0, 7.0)


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
