"""Entries that are explained in steps, between two of them: turns, limits, deadlines, cancellation, the end."""

import dataclasses
import threading

import numpy as np
import pytest

from batching import ABLATION, IMAGE, LAYER, OTHER, SMOOTHED, STEPPED, Bench, finish, step, stepping
from heatlens_server.core.errors import DeadlineExpired, QueueFull
from heatlens_server.scheduling.batcher import STACK_S
from heatlens_server.scheduling.entry import Entry, EntryState, Progress, Source

BIG = dataclasses.replace(IMAGE, pixels=np.zeros((2, 3, 3), np.uint8))


def kept(entry: Entry, discarded: list[Progress]) -> Progress:
    """What the device thread leaves on an entry after its first step."""
    entry.steps = Progress(rows=4, queue_s=0.0, discard=discarded.append)
    return entry.steps


def test_images_of_different_sizes_never_share_a_batch():
    at = Bench()
    entries = [at.put(image=image) for image in (IMAGE, BIG, IMAGE, BIG)]
    assert at.taken() == [entries[0], entries[2]]
    assert at.taken() == [entries[1], entries[3]]


@pytest.mark.parametrize("spec", [STEPPED, SMOOTHED, ABLATION])
def test_an_entry_in_steps_is_claimed_alone_and_waits_again(spec):
    at = Bench()
    entry, _ = at.put(spec), at.put(spec)
    assert stepping(at) is entry
    assert len(at.batcher) == 1
    assert at.due() is None
    assert at.batcher.put_back(0, entry)
    assert (entry.state, len(at.batcher)) == (EntryState.WAITING, 2)
    assert stepping(at) is entry
    assert at.batcher.finish(0, entry)
    assert entry.state is EntryState.CLAIMED
    assert not at.batcher.withdraw(entry)


def test_one_that_waits_again_takes_its_place_from_others():
    at = Bench(max_queue_length=1)
    entry = at.put(STEPPED)
    stepping(at)
    at.admit()  # the place was free
    assert at.batcher.put_back(0, entry)
    with pytest.raises(QueueFull):
        at.admit()
    assert len(at.batcher) == 2


def test_a_batch_waits_for_one_step_of_ten():
    at = Bench(max_queue_length=99)
    for spec in (STEPPED, ABLATION) * 5:
        at.put(spec)
    for _ in range(25):
        running = stepping(at)
        assert at.due() is None  # no second one is claimed ahead
        at.clock.now += 0.05  # half of what is expected
        ordinary = [at.put(), at.put()]
        assert at.batcher.put_back(0, running)
        batch = at.due()
        assert batch == ordinary
        at.run(batch, 0.01)
        step(at)


def test_a_batch_is_closed_ahead_of_a_steps_end_and_a_step_ahead_of_a_batchs():
    at = Bench()
    at.learn(0.01)
    at.put(STEPPED)
    first = step(at)
    assert stepping(at) is first
    at.clock.now += 0.05
    ordinary = at.put()
    assert at.due() is None
    at.clock.now += 0.0485
    ahead = at.due()
    assert ahead == [ordinary]
    assert at.batcher.put_back(0, first)
    assert at.due() is None  # no second one is claimed ahead
    assert at.batcher.begin(0, ahead)
    assert at.due() is None
    at.clock.now += 0.0085
    assert at.due() == [first]


def test_steps_go_on_under_a_steady_load_of_full_batches():
    at = Bench(max_batch_size=2, max_queue_length=999)
    at.learn(0.01, 2)
    crowd = [Source() for _ in range(4)]
    for spec in (LAYER, OTHER) * 50:
        for source in crowd:
            at.put(spec, source=source)
    slow = [at.put(STEPPED) for _ in range(3)]
    counts = dict.fromkeys([LAYER, OTHER, STEPPED], 0)
    ahead = at.due()
    for _ in range(60):
        assert at.batcher.begin(0, ahead)
        at.clock.now += 0.01
        running, ahead = ahead, at.due()
        counts[running[0].spec] += 1
        if running[0].spec is STEPPED:
            assert at.batcher.put_back(0, running[0])
        else:
            at.batcher.end_batch(0)
        ahead = ahead or at.due()
    # While a step runs, a batch is closed ahead, and after it both buckets have their turns.
    assert list(counts.values()) == [23, 22, 15]
    assert all(entry.state in {EntryState.WAITING, EntryState.STEPPING} for entry in slow)


def test_cancelled_between_two_steps():
    at, discarded = Bench(), []
    entry = at.put(STEPPED)
    progress = kept(entry, discarded)
    step(at)
    assert at.batcher.withdraw(entry)
    assert not at.batcher.withdraw(entry)
    assert discarded == [progress]
    assert (entry.state, entry.steps, entry.image) == (EntryState.GONE, None, None)
    assert at.due() is None
    assert len(at.batcher) == 0


@pytest.mark.parametrize("done", [True, False])
def test_cancelled_while_a_step_runs(done):
    at, discarded = Bench(), []
    entry = at.put(STEPPED)
    kept(entry, discarded)
    stepping(at)
    assert at.batcher.withdraw(entry)
    assert discarded == []  # its thread is at it
    assert not (at.batcher.finish if done else at.batcher.put_back)(0, entry)
    assert entry.state is EntryState.GONE
    assert len(at.batcher) == 0
    assert not at.batcher.withdraw(entry)


def test_a_deadline_passes_between_two_steps():
    at, discarded = Bench(), []
    entry, other = at.put(STEPPED, timeout_s=0.25), at.put(ABLATION)
    progress = kept(entry, discarded)
    assert [step(at) for _ in range(3)] == [entry, other, entry]
    assert at.batcher.take() == [other]
    ((late, outcome),) = at.delivered
    assert late is entry
    assert isinstance(outcome, DeadlineExpired)
    assert "last step" in outcome.message
    assert discarded == [progress]


def test_a_deadline_that_passes_during_a_step_is_noticed_after_it():
    at, discarded = Bench(), []
    entry = at.put(STEPPED, timeout_s=0.05)
    progress = kept(entry, discarded)
    step(at)
    other = at.put()
    assert at.batcher.take() == [other]
    assert [late for late, _ in at.delivered] == [entry]
    assert discarded == [progress]


def test_a_frames_timeout_is_over_once_it_is_begun():
    at = Bench()
    stream = Source()
    frames = [at.put(STEPPED, timeout_s=0.25, source=stream) for _ in range(2)]
    assert [step(at) for _ in range(2)] == [frames[0]] * 2
    at.clock.now += 0.1
    assert stepping(at) is frames[0]
    # The other one was not begun in time.
    ((late, outcome),) = at.delivered
    assert late is frames[1]
    assert isinstance(outcome, DeadlineExpired)
    assert at.batcher.put_back(0, frames[0])
    at.clock.now += 9.0
    assert finish(at) is frames[0]
    assert at.batcher.seconds_until_due() is None


def test_a_full_queue_of_steps_says_when_an_explanation_will_have_ended():
    def hint() -> float:
        with pytest.raises(QueueFull) as refused:
            at.put()
        return refused.value.retry_after_s

    at = Bench(max_queue_length=2, max_batch_size=4)
    at.learn(0.2, 4)
    entries = [at.put(STEPPED), at.put(STEPPED)]
    assert hint() == pytest.approx(1.0)  # nothing is known
    for _ in range(29):
        step(at, seconds=0.5)
    assert finish(at, seconds=0.5) is entries[0]
    at.put(STEPPED)
    assert hint() == pytest.approx(15.0)
    # With a caller that waits for a batch: it comes after a step.
    assert at.batcher.withdraw(entries[1])
    at.put()
    assert hint() == pytest.approx(0.2 + 0.5)


def test_a_closed_batcher_hands_out_all_steps_and_ends_after_the_last():
    at = Bench()
    entry = at.put(STEPPED)
    step(at)
    at.batcher.close()
    assert at.batcher.take() == [entry]
    assert at.batcher.begin(0, [entry])
    taken: list[list[Entry] | None] = []
    thread = threading.Thread(target=lambda: taken.extend([at.batcher.take(), at.batcher.take()]))
    thread.start()
    assert at.batcher.put_back(0, entry)  # only now there is something to take: the thread must not have given up
    while entry.state is not EntryState.STEPPING:
        pass
    assert at.batcher.finish(0, entry)
    thread.join(10)
    assert taken == [[entry], None]


def test_steps_and_batches_are_timed_apart():
    at = Bench()
    at.learn(0.1)
    at.put(STEPPED)
    for _ in range(20):
        step(at, seconds=7.0)
    stepping(at)
    at.put()
    assert at.batcher.seconds_until_due() == pytest.approx(7.0 - STACK_S)

    at = Bench()
    at.learn(0.1)
    at.put(STEPPED)
    finish(at, seconds=7.0)
    at.occupy()
    at.put()
    assert at.batcher.seconds_until_due() == pytest.approx(0.1 - STACK_S)
