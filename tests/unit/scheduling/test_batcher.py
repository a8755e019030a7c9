"""Batch forming with a fake clock: no test here sleeps."""

import threading

import pytest

from batching import IMAGE, OTHER, Bench
from heatlens_server.core.errors import DeadlineExpired, QueueFull, ServerDraining
from heatlens_server.scheduling.batcher import STACK_S
from heatlens_server.scheduling.entry import Entry, EntryState, Source


def test_idle_device_takes_a_single_image_at_once():
    bench = Bench()
    entry = bench.put()
    assert bench.batcher.take() == [entry]
    assert entry.state is EntryState.CLAIMED


def test_busy_device_lets_the_batch_fill_for_the_delay_when_nothing_is_known_about_it():
    bench = Bench()
    bench.occupy()
    first = bench.put()
    assert bench.due() is None
    bench.clock.now += 0.0019
    second = bench.put()
    assert bench.due() is None
    bench.clock.now += 0.0002
    assert bench.due() == [first, second]


def test_batch_stays_open_until_the_running_one_is_about_to_end():
    bench = Bench()
    bench.learn(0.1)
    bench.occupy()
    bench.put()
    bench.clock.now += 0.05  # far more than the delay, but the device is busy for another 50 ms
    assert bench.due() is None
    bench.put()
    bench.clock.now += 0.05 - STACK_S + 1e-6
    batch = bench.due()
    assert batch is not None
    assert len(batch) == 2


def test_full_batch_is_closed_at_once_and_holds_the_oldest():
    bench = Bench(max_batch_size=3)
    bench.occupy(3)
    entries = [bench.put() for _ in range(5)]
    assert bench.due() == entries[:3]
    assert bench.due() is None
    assert len(bench.batcher) == 2


def test_images_of_different_buckets_never_share_a_batch_and_the_oldest_bucket_goes_first():
    bench = Bench()
    other = bench.put(OTHER)
    bench.clock.now += 0.0001
    same = [bench.put(), bench.put()]
    assert bench.taken() == [other]
    assert bench.taken() == same


def test_earliest_deadline_closes_a_batch_before_its_time():
    bench = Bench()
    bench.learn(1.0)
    bench.occupy()
    bench.put(timeout_s=1.5)
    assert bench.due() is None
    bench.clock.now += 0.51  # 0.99 s are left, and the batch would take 1 s
    assert bench.due() is not None


def test_expired_entry_is_answered_and_never_handed_out():
    bench = Bench()
    late, fine = bench.put(timeout_s=0.01), bench.put()
    bench.clock.now += 0.02
    assert bench.batcher.take() == [fine]
    ((entry, outcome),) = bench.delivered
    assert entry is late
    assert isinstance(outcome, DeadlineExpired)
    assert late.state is EntryState.GONE
    assert len(bench.batcher) == 0


def test_withdrawn_entry_leaves_its_mates_alone():
    bench = Bench()
    entries = [bench.put() for _ in range(3)]
    assert bench.batcher.withdraw(entries[1])
    assert not bench.batcher.withdraw(entries[1])
    assert bench.batcher.take() == [entries[0], entries[2]]
    assert not bench.batcher.withdraw(entries[0])


def test_withdrawn_while_being_decoded_is_dropped_when_it_arrives():
    bench = Bench()
    entry = bench.admit()
    assert bench.batcher.withdraw(entry)
    bench.batcher.put(entry, IMAGE)
    assert bench.due() is None
    assert len(bench.batcher) == 0


def test_full_queue_refuses_at_once_says_when_to_come_back_and_recovers():
    bench = Bench(max_queue_length=2)
    bench.admit()
    bench.put()
    with pytest.raises(QueueFull) as refused:
        bench.admit()
    assert refused.value.retry_after_s == 1.0
    assert bench.batcher.take() is not None
    bench.admit()


def test_a_full_queue_says_so_before_anybody_asks_for_a_place():
    bench = Bench(max_queue_length=2)
    bench.put(timeout_s=0.01)
    assert bench.batcher.refusal() is None
    bench.admit(source=Source())
    assert bench.batcher.refusal() is None
    bench.put()
    refusal = bench.batcher.refusal()
    assert isinstance(refusal, QueueFull)
    assert (refusal.retry_after_s, refusal.metadata) == (1.0, {"max_queue_length": "2"})
    bench.clock.now += 0.02
    assert bench.batcher.refusal() is None
    assert len(bench.delivered) == 1


def test_expired_entries_do_not_keep_a_queue_full():
    bench = Bench(max_queue_length=2)
    bench.put(timeout_s=0.01)
    bench.put(timeout_s=0.01)
    bench.clock.now += 0.02
    bench.put()
    assert len(bench.delivered) == 2
    assert len(bench.batcher) == 1


def test_closed_batcher_admits_nothing_and_hands_out_what_is_left():
    bench = Bench()
    entry = bench.put()
    bench.batcher.close()
    with pytest.raises(ServerDraining):
        bench.admit()
    assert bench.batcher.closed
    assert bench.batcher.take() == [entry]
    assert bench.batcher.take() is None


def test_close_waits_for_an_image_that_is_being_decoded():
    bench = Bench()
    entry = bench.admit()
    bench.batcher.close()
    taken: list[list[Entry] | None] = []
    thread = threading.Thread(target=lambda: taken.extend([bench.batcher.take(), bench.batcher.take()]))
    thread.start()
    bench.batcher.put(entry, IMAGE)
    thread.join(10)
    assert taken == [[entry], None]


def test_take_wakes_for_an_arrival():
    bench = Bench()
    taken: list[list[Entry] | None] = []
    thread = threading.Thread(target=lambda: taken.append(bench.batcher.take()))
    thread.start()
    entry = bench.put()
    thread.join(10)
    assert taken == [[entry]]
