"""Batches and steps of a model with two devices, on a fake clock."""

import pytest

from batching import LAYER, OTHER, STEPPED, Bench
from heatlens_server.core.errors import QueueFull
from heatlens_server.scheduling.batcher import STACK_S
from heatlens_server.scheduling.entry import Entry


def bench(**options: int) -> Bench:
    """Two idle devices: the first takes 0.1 s for an image, the second 0.3 s."""
    at = Bench(device_count=2, max_queue_length=99, **options)
    for device, seconds in enumerate((0.1, 0.3)):
        at.learn(seconds, device=device)
    return at


def begin(at: Bench, device: int) -> Entry:
    """The entry whose step the device begins."""
    claimed = at.due()
    assert claimed is not None
    assert claimed[0].device == device
    assert at.batcher.begin(device, claimed)
    return claimed[0]


def test_an_idle_device_takes_what_comes_while_the_other_is_busy():
    at = bench()
    at.occupy(device=1)
    first = at.put()
    claimed = at.due()
    assert claimed == [first]
    assert at.batcher.begin(0, claimed)
    at.put()
    assert at.due() is None


def test_a_batch_is_closed_when_the_first_device_is_about_to_be_free():
    at = bench()
    at.occupy(device=1)
    at.clock.now += 0.25  # the slow one is free in 50 ms, the fast one in 100
    at.occupy(device=0)
    entry = at.put()
    assert at.due() is None
    assert at.batcher.seconds_until_due() == pytest.approx(0.05 - STACK_S)
    at.clock.now += 0.05 - STACK_S
    assert at.due() == [entry]
    # The next one is for the device that is free after that.
    at.put()
    assert at.batcher.seconds_until_due() == pytest.approx(0.05)


def test_one_full_batch_per_device_is_closed_ahead_and_any_device_begins_it():
    at = bench(max_batch_size=2)
    for device in (0, 1):
        at.occupy(device=device)
    entries = [at.put() for _ in range(6)]
    ahead = [at.due(), at.due()]
    assert ahead == [entries[:2], entries[2:4]]
    assert at.due() is None
    # The slow device is free first, against expectation.
    at.batcher.end_batch(1)
    assert at.batcher.begin(1, ahead[0])
    assert at.due() == entries[4:]


def test_buckets_keep_their_turns():
    at = bench(max_batch_size=2)
    entries = {spec: [at.put(spec) for _ in range(4)] for spec in (LAYER, OTHER)}
    order = [at.due(), at.due()]
    for device, batch in enumerate(order):
        assert at.batcher.begin(device, batch)
    order += [at.due(), at.due()]
    assert order == [entries[LAYER][:2], entries[OTHER][:2], entries[LAYER][2:], entries[OTHER][2:]]


def test_each_device_has_a_step_and_keeps_its_explanation():
    at = bench()
    entries = [at.put(STEPPED) for _ in range(3)]
    assert [begin(at, 0), begin(at, 1)] == entries[:2]
    assert at.due() is None
    for _ in range(3):
        at.clock.now += 0.1
        assert at.batcher.put_back(1, entries[1])
        assert begin(at, 1) is entries[1]
    assert at.batcher.finish(1, entries[1])
    assert begin(at, 1) is entries[2]
    assert at.batcher.put_back(0, entries[0])
    assert begin(at, 0) is entries[0]


def test_an_idle_device_leaves_another_devices_explanation_alone():
    at = bench()
    entry = at.put(STEPPED)
    begin(at, 0)
    ordinary = at.put()
    other = at.put(OTHER)
    assert at.batcher.put_back(0, entry)
    for device, expected in enumerate((ordinary, other)):
        claimed = at.due()
        assert claimed == [expected]
        assert at.batcher.begin(device, claimed)
    at.batcher.end_batch(1)
    assert at.due() is None
    at.batcher.end_batch(0)
    assert begin(at, 0) is entry


def test_a_batch_waits_for_the_first_step_to_end():
    at = bench()
    running = [at.put(STEPPED), at.put(STEPPED)]
    for device in (0, 1):
        begin(at, device)
    ordinary = at.put()
    at.clock.now += 0.1
    assert at.batcher.put_back(1, running[1])
    assert at.due() == [ordinary]


def test_a_step_that_is_withdrawn_before_it_begins_leaves_its_device_free():
    at = bench()
    entry, other = at.put(STEPPED), at.put(STEPPED)
    claimed = at.due()
    assert at.batcher.withdraw(entry)
    assert not at.batcher.begin(0, claimed)
    assert begin(at, 0) is other


def test_two_devices_make_places_twice_as_fast():
    def hint(device_count: int) -> float | None:
        at = Bench(device_count=device_count, max_queue_length=1, max_batch_size=4)
        for device in range(device_count):
            at.learn(0.8, device=device)
        at.put()
        with pytest.raises(QueueFull) as refused:
            at.put()
        return refused.value.retry_after_s

    assert hint(1) == pytest.approx(3.2)
    assert hint(2) == pytest.approx(1.6)
