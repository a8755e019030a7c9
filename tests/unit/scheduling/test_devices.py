"""Devices that are taken out and put in again, and how those that serve share the work, on a fake clock."""

import math
from collections import Counter, deque

import pytest

from batching import LAYER, STEPPED, Bench
from heatlens_server.core.errors import QueueFull
from heatlens_server.scheduling.entry import Entry, Source


def begin(at: Bench, device: int) -> Entry:
    """The entry that the device begins."""
    claimed = at.due()
    assert claimed is not None
    assert at.batcher.begin(device, claimed)
    return claimed[0]


def work_off(at: Bench, durations_s: tuple[float, ...]) -> list[tuple[int, Entry]]:
    """Let devices of such speeds run all batches that wait; who began what, in order."""
    begun: list[tuple[int, Entry]] = []
    ahead: deque[list[Entry]] = deque()
    ends_at: dict[int, float] = {}
    while True:
        while (claimed := at.due()) is not None:
            ahead.append(claimed)
        for device in range(len(durations_s)):
            if ahead and device not in ends_at:
                batch = ahead.popleft()
                assert at.batcher.begin(device, batch)
                begun += [(device, entry) for entry in batch]
                ends_at[device] = at.clock.now + durations_s[device]
        if not ends_at:
            return begun
        # What is due before a device is free is claimed then.
        soonest = min(ends_at, key=ends_at.__getitem__)
        wait_s = at.batcher.seconds_until_due()
        if wait_s is not None and wait_s > 0 and at.clock.now + wait_s < ends_at[soonest]:
            at.clock.now += wait_s
            continue
        at.clock.now = max(at.clock.now, ends_at.pop(soonest))
        at.batcher.end_batch(soonest)


def test_a_slow_and_a_fast_device_share_by_speed():
    at = Bench(device_count=2, max_queue_length=99, max_batch_size=1)
    for _ in range(80):
        at.put()
    ran = Counter(device for device, _ in work_off(at, (0.1, 0.3)))
    assert ran[0] == pytest.approx(60, abs=2)
    assert ran[0] + ran[1] == 80


def test_callers_take_turns_whatever_the_devices_are():
    at = Bench(device_count=2, max_queue_length=99, max_batch_size=1)
    sources = [Source() for _ in range(3)]
    for source, count in zip(sources, (40, 20, 20), strict=True):
        for _ in range(count):
            at.put(source=source)
    order = [sources.index(entry.source) for _, entry in work_off(at, (0.1, 0.3))]
    # While all three have images waiting, none is ahead by more than one.
    for end in range(1, 61):
        counts = [order[:end].count(source) for source in range(3)]
        assert max(counts) - min(counts) <= 1


def test_images_of_a_source_are_begun_in_order():
    at = Bench(device_count=2, max_queue_length=99, max_batch_size=2)
    source = Source()
    entries = [at.put(source=source) for _ in range(20)]
    assert [entry for _, entry in work_off(at, (0.1, 0.3))] == entries


def test_a_device_that_is_taken_out_gets_nothing_until_it_is_put_in():
    at = Bench(device_count=2)
    devices = at.batcher.devices
    assert devices.take_out(0, "its runs fail")
    assert (devices.faults, devices.serves(0), devices.serves(1)) == (("its runs fail", ""), False, True)
    at.put()
    begin(at, 1)
    at.put()
    assert at.due() is None  # though the first one is idle
    devices.put_in(0)
    begin(at, 0)
    assert devices.faults == ("", "")


def test_explanations_in_steps_that_it_has_begun_begin_anew_on_another_one():
    at = Bench(device_count=2)
    entry, other = at.put(STEPPED), at.put(STEPPED)
    assert [begin(at, 0), begin(at, 1)] == [entry, other]
    assert at.batcher.put_back(0, entry)
    assert entry.device == 0
    assert at.batcher.devices.take_out(0, "its runs fail")
    assert at.due() is None  # the other one has its own explanation
    assert at.batcher.finish(1, other)
    assert begin(at, 1) is entry
    assert entry.device == 1


def test_a_step_that_failed_begins_anew_on_another_device():
    at = Bench(device_count=2)
    entry = at.put(STEPPED)
    begin(at, 0)
    assert at.batcher.devices.take_out(0, "its runs fail")
    assert at.batcher.put_back(0, entry, anew=True)
    assert begin(at, 1) is entry


def test_the_only_device_is_never_taken_out():
    at = Bench()
    assert not at.batcher.devices.take_out(0, "its runs fail")
    at.put()
    begin(at, 0)


def test_the_last_device_may_be_taken_out_and_says_that_no_other_serves():
    at = Bench(device_count=2)
    assert at.batcher.devices.take_out(0, "one")
    assert not at.batcher.devices.take_out(1, "two")
    assert at.batcher.devices.hangs_s(1.0) == math.inf
    at.put()
    assert at.due() is None
    # The end is not held up.
    at.batcher.close()
    assert at.due() is not None


def test_a_device_that_hangs_is_taken_out_with_what_it_runs_and_was_to_run():
    at = Bench(device_count=2)
    first = at.put(STEPPED)
    assert begin(at, 0) is first
    second = at.put()
    assert at.batcher.put_back(0, first)
    assert begin(at, 0) is second
    at.clock.now += 60.0
    (hanging,) = at.batcher.devices.take_out_hanging(30.0)
    assert (hanging.device, hanging.running_s) == (0, 60.0)
    assert hanging.entries == [second]
    assert at.batcher.devices.faults[0] == "what it runs has been running for 60 s"
    assert begin(at, 1) is first  # what is between two of its steps goes elsewhere
    assert at.batcher.devices.take_out_hanging(30.0) == []


def test_devices_that_all_hang_stay_in():
    at = Bench(device_count=2)
    for device in (0, 1):
        at.occupy(device=device)
    at.clock.now += 60.0
    assert at.batcher.devices.take_out_hanging(30.0) == []
    assert at.batcher.devices.hangs_s(30.0) == 60.0


def test_a_device_that_is_waited_for_is_spared():
    at = Bench(device_count=2)
    at.occupy(device=0)
    at.clock.now += 60.0
    assert at.batcher.devices.take_out_hanging(30.0, spared=[0]) == []
    assert at.batcher.devices.hangs_s(30.0) == 0.0  # the other one does not


def test_places_are_made_by_the_devices_that_serve():
    at = Bench(device_count=2, max_queue_length=1, max_batch_size=4)
    for device in (0, 1):
        at.learn(0.8, device=device)
    at.put()
    at.batcher.devices.take_out(0, "its runs fail")
    with pytest.raises(QueueFull) as refused:
        at.put(LAYER)
    assert refused.value.retry_after_s == pytest.approx(3.2)
