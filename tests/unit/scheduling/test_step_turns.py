"""Whose step is next: specs in turns, the entries of one spec one after the other."""

import dataclasses
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import ABLATION, LAYER, OTHER, SMOOTHED, STEPPED, Bench, finish, step, stepping
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.entry import Entry, EntryState, Source
from heatlens_server.scheduling.step_turns import StepTurns

LATE = dataclasses.replace(ABLATION, layers=("late",))
STEPS = (STEPPED, ABLATION, SMOOTHED)


def test_equal_entries_end_one_after_the_other():
    """Twelve of a second each, in ten steps: one ends every second, instead of all at the end."""
    at = Bench(max_queue_length=99)
    entries = [at.put(STEPPED) for _ in range(12)]
    for ended, entry in enumerate(entries):
        assert [step(at) for _ in range(9)] == [entry] * 9
        assert finish(at) is entry
        assert at.clock.now - 100.0 == pytest.approx(ended + 1)
        assert [other for other in entries if other.begun] == entries[: ended + 1]


def test_a_job_of_one_step_waits_for_one_step_of_each_other_spec():
    at = Bench(max_queue_length=99)
    slow = [at.put(spec) for spec in (STEPPED, ABLATION, STEPPED, ABLATION)]
    assert [step(at) for _ in range(3)] == [slow[0], slow[1], slow[0]]
    running = stepping(at)
    assert running is slow[1]
    short = at.put(SMOOTHED)
    assert at.batcher.put_back(0, running)
    assert [step(at), finish(at), step(at)] == [slow[0], short, slow[1]]


def test_a_spec_that_comes_during_a_step_goes_before_that_steps_own():
    at = Bench()
    slow, _ = at.put(STEPPED), at.put(STEPPED)
    assert stepping(at) is slow
    short = at.put(SMOOTHED)
    assert at.batcher.put_back(0, slow)
    assert finish(at) is short


def test_specs_take_turns():
    at = Bench()
    entries = [at.put(spec) for spec in (STEPPED, ABLATION, SMOOTHED)]
    assert [step(at) for _ in range(7)] == [*entries, *entries, entries[0]]


def test_a_few_specs_are_begun_at_a_time():
    at = Bench(max_queue_length=99)
    entries = [at.put(dataclasses.replace(STEPPED, layers=(f"layer{i}",))) for i in range(12)]
    more = at.put(entries[0].spec)
    begun = [step(at) for _ in range(24)]
    assert begun == entries[:8] * 3
    assert finish(at) is entries[0]
    # Those that wait to begin are first now; the spec that has ended an entry waits like them.
    assert [step(at) for _ in range(8)] == [entries[8], *entries[1:8]]
    assert finish(at) is entries[8]
    assert step(at) is entries[9]
    assert not more.begun


def test_a_stream_finishes_a_frame_before_it_begins_the_next():
    at = Bench(max_queue_length=99)
    stream, rival = Source(), at.put(ABLATION)
    frames = [at.put(STEPPED, source=stream) for _ in range(20)]
    assert [step(at) for _ in range(4)] == [rival, frames[0], rival, frames[0]]
    assert step(at) is rival
    assert finish(at) is frames[0]
    assert [step(at) for _ in range(2)] == [rival, frames[1]]


def test_sources_take_turns_to_begin():
    at = Bench(max_queue_length=99)
    stream = Source()
    frames = [at.put(STEPPED, source=stream) for _ in range(3)]
    caller = at.put(STEPPED)
    assert [finish(at) for _ in range(4)] == [frames[0], caller, *frames[1:]]


def test_a_stream_that_replaces_its_only_frame_keeps_its_turn():
    at = Bench(max_queue_length=99)
    camera = Source()
    rivals = [at.put(spec) for spec in (STEPPED, ABLATION)]
    frame = at.put(SMOOTHED, source=camera)
    assert step(at) is rivals[0]
    at.put(LATE)
    assert at.batcher.withdraw(frame)
    frame = at.put(SMOOTHED, source=camera)
    assert [step(at) for _ in range(2)] == [rivals[1], frame]


def test_a_spec_that_has_many_steps_on_another_device_keeps_its_turn_on_this_one():
    turns = StepTurns(device_count=2)

    def put(spec: MapSpec) -> None:
        entry = Entry(TopK(1), spec, None, lambda outcome: None)
        turns.put(entry, entry)

    def step(device: int) -> MapSpec:
        entry = turns.take(device)
        assert entry.device in (None, device)
        entry.device = device
        turns.end_step(entry)
        turns.put_back(entry)
        return entry.spec

    for _ in range(2):
        put(STEPPED)
    assert [step(0), step(1)] == [STEPPED, STEPPED]
    for spec in (ABLATION, SMOOTHED, LATE):
        put(spec)
    order = []
    for _ in range(12):
        order.append(step(0))
        if len(set(order)) == 4:  # nothing is left for the second device to begin
            assert [step(1) for _ in range(3)] == [STEPPED] * 3
    assert all(len(set(order[i : i + 4])) == 4 for i in range(9))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    # What each run takes, often more or less than what was learned; what comes before each of its ticks; and whether a
    # step is its entry's last one.
    runs=st.lists(st.integers(1, 6), min_size=30, max_size=30),
    arrivals=st.lists(st.sampled_from([None, None, LAYER, OTHER, *STEPS]), min_size=60, max_size=60),
    ends=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_who_waits_for_how_many_steps_whenever_they_come(runs, arrivals, ends):
    """A device's thread and the one that stacks, on a fake clock, a batch claimed ahead and all.

    No entry waits for two steps before its batch; of one spec, entries run one after the other in the order they came;
    and between two steps of one spec every other spec that waits all the while has one.
    """
    at = Bench(max_batch_size=16, max_queue_length=999)
    lines = {spec: deque[Entry]() for spec in STEPS}
    for _ in range(3):
        lines[STEPPED].append(at.put(STEPPED))
    # How many steps there were since an entry came, and since a spec waits or had its turn.
    waited: dict[Entry, int] = {}
    passed = {STEPPED: 0}
    running: list[Entry] | None = None
    ahead: list[Entry] | None = None
    left = 0
    durations, coming, lasts = iter(runs), iter(arrivals), iter(ends)
    steps_run = 0
    for _ in range(6 * len(runs)):
        if running is None:
            ahead = ahead or at.due()
            running, ahead = ahead, None
            if running is not None:
                left = next(durations, 0)
                if not left:
                    break
                is_step = running[0].state is EntryState.STEPPING
                steps_run += is_step
                assert at.batcher.begin(0, running)
                if is_step:
                    waited.update({entry: steps + 1 for entry, steps in waited.items()})
                    spec = running[0].spec
                    assert running == [lines[spec][0]]
                    assert passed.pop(spec) < len(STEPS)
                    passed.update({other: steps + 1 for other, steps in passed.items()})
                for entry in running:
                    assert waited.pop(entry, 0) <= 1
        spec = next(coming, None)
        if spec is not None:
            entry = at.put(spec)
            if spec.in_steps:
                lines[spec].append(entry)
                if running is None or running[0].spec != spec:
                    passed.setdefault(spec, 0)
            else:
                # It waits for the rest of the step that runs.
                waited[entry] = int(running is not None and running[0].state is EntryState.STEPPING)
        if ahead is None:
            ahead = at.due()
        at.clock.now += 0.01
        left -= 1
        if running is not None and left <= 0:
            if running[0].state is EntryState.STEPPING:
                spec = running[0].spec
                if next(lasts):
                    assert at.batcher.finish(0, running[0])
                    lines[spec].popleft()
                else:
                    assert at.batcher.put_back(0, running[0])
                if lines[spec]:
                    passed[spec] = 0
            else:
                at.batcher.end_batch(0)
            running = None
    assert steps_run
    assert sum(entry.begun for line in lines.values() for entry in line) <= len(STEPS)
