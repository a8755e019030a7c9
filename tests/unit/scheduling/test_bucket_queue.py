"""Who runs first: sources take turns inside a bucket, and buckets take turns. A fake clock, no sleeps."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batching import IMAGE, LAYER, OTHER, Bench
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import QueueFull
from heatlens_server.scheduling.batcher import STACK_S
from heatlens_server.scheduling.entry import Entry, EntryState, Source
from heatlens_server.scheduling.pace import STEP_S

BATCH = 8


def bench(**options: float) -> Bench:
    return Bench(**{"max_batch_size": BATCH, "max_queue_length": 16} | options)


def many(at: Bench, count: int, source: Source, spec: MapSpec = LAYER) -> list[Entry]:
    return [at.put(spec, source=source) for _ in range(count)]


def test_a_stream_with_one_image_is_in_the_next_batch_of_one_with_64():
    at = bench()
    big = many(at, 64, Source())
    assert at.taken() == big[:8]
    small = at.put(source=Source())
    assert set(at.taken()) == {small, *big[8:15]}


def test_the_same_across_buckets():
    at = bench()
    big = many(at, 64, Source())
    small = at.put(OTHER, source=Source())
    assert at.taken() == big[:8]
    assert at.taken() == [small]
    assert at.taken() == big[8:16]


def test_callers_with_one_image_share_with_a_big_stream():
    at = bench()
    big = many(at, 64, Source())
    callers = [at.put() for _ in range(4)]
    assert at.taken() == [big[0], *callers, *big[1:4]]


def test_a_flood_of_callers_leaves_a_stream_its_turn():
    at = bench()
    stream = many(at, 3, Source())
    for i in range(3):
        crowd = [at.put() for _ in range(BATCH)]
        batch = at.taken()
        assert stream[i] in batch
        assert len(batch) == BATCH
        assert crowd[-1] not in batch  # one too many: it is left over, and first next time
        for entry in crowd:
            at.batcher.withdraw(entry)


def test_two_streams_that_always_wait_get_the_same_whatever_their_windows():
    at = bench(max_batch_size=5)
    windows = {Source(): 64, Source(): 3, Source(): 7}
    source_of = {}
    served: Counter[Source] = Counter()
    for source, window in windows.items():
        source_of |= dict.fromkeys(many(at, window, source), source)
    for _ in range(40):
        for entry in at.taken():
            served[source_of[entry]] += 1
            source_of[at.put(source=source_of[entry])] = source_of[entry]
        assert max(served.values()) - min(served[source] for source in windows) <= 1


def test_an_idle_source_gets_no_credit_for_the_past():
    at = bench()
    idle, busy = Source(), Source()
    many(at, 1, idle)
    many(at, 80, busy)
    for _ in range(9):
        at.taken()
    back = many(at, 64, idle)
    batch = at.taken()
    assert sum(entry in back for entry in batch) == BATCH // 2


def test_a_source_that_ran_alone_has_no_debt():
    at = bench()
    alone = Source()
    many(at, 64, alone)
    for _ in range(8):
        at.taken()
    other, again = many(at, 64, Source()), many(at, 64, alone)
    assert sum(entry in again for entry in at.taken()) == BATCH // 2
    assert other[0].state is EntryState.CLAIMED


def test_a_lone_stream_in_another_bucket_does_not_set_callers_back():
    at = bench()
    crowd = [many(at, 64, Source()) for _ in range(BATCH)]
    many(at, 64, Source(), OTHER)
    at.taken()
    at.taken()
    caller = at.put()
    # The crowd's next round was waiting before; then it is the caller's turn. The other bucket goes once in each round.
    batches = [at.taken() for _ in range(3)]
    assert caller in batches[2]
    assert all(entries[1] in batches[0] for entries in crowd)


def test_order_within_a_source_is_kept():
    at = bench()
    sources = [Source() for _ in range(3)]
    lines = {source: many(at, 20, source) for source in sources}
    order = [entry for _ in range(8) for entry in at.taken()]
    for source, line in lines.items():
        assert [entry for entry in order if entry.source is source] == line


def test_images_of_streams_take_no_place_from_callers():
    at = bench(max_queue_length=2)
    stream = many(at, 64, Source())
    callers = [at.put(), at.put()]
    with pytest.raises(QueueFull):
        at.put()
    stream += many(at, 1, stream[0].source)
    assert len(at.batcher) == 67
    assert set(callers) < set(at.taken())
    at.put()


def test_withdrawn_images_cost_their_source_nothing():
    at = bench(max_batch_size=2)
    dropper, rival = Source(), Source()
    many(at, 64, rival)
    kept = many(at, 33, dropper)
    for entry in kept[:-1]:  # a camera that is faster than the server
        assert at.batcher.withdraw(entry)
    assert kept[-1] in at.taken()


@pytest.mark.parametrize("spec", [LAYER, OTHER])
def test_a_stream_that_replaces_its_only_image_keeps_its_turn(spec):
    at = bench(max_batch_size=2)
    camera = Source()
    rivals = [Source() for _ in range(6)]
    for rival in rivals:
        many(at, 8, rival)
    frame = at.put(spec, source=camera)
    batches = 0
    while frame.state is EntryState.WAITING:
        assert at.batcher.withdraw(frame)
        frame = at.put(spec, source=camera)
        at.taken()
        batches += 1
    assert batches <= 4  # six rivals in batches of two, then the camera


def test_a_bucket_that_is_always_full_cannot_shut_out_another_on_a_busy_device():
    at = bench()
    at.learn(0.1, BATCH)
    many(at, 64, Source())
    lone = at.put(OTHER, source=Source())
    running = at.due()
    assert len(running) == BATCH
    assert at.batcher.begin(0, running)
    assert at.due() is None  # full again, but it is the other's turn, which may still fill
    assert at.batcher.seconds_until_due() == pytest.approx(0.1 - STACK_S)
    at.clock.now += 0.1 - STACK_S
    ahead = at.due()
    assert ahead == [lone]
    at.batcher.end_batch(0)
    assert at.batcher.begin(0, ahead)
    assert len(at.due()) == BATCH  # its turn, and full: at once


def test_a_busy_device_does_not_wait_for_a_bucket_that_is_not_due():
    at = bench(max_delay_s=10.0)
    at.learn(0.1, BATCH)
    at.occupy(BATCH)
    lone = at.put(OTHER)
    many(at, 64, Source())
    assert at.due() is None
    at.clock.now += 0.1 - STACK_S
    assert len(at.due()) == BATCH
    assert lone.state is EntryState.WAITING


def test_a_bucket_that_is_empty_when_its_turn_comes_loses_it():
    at = bench()
    camera = Source()
    frame = at.put(OTHER, source=camera)
    first = many(at, 12, Source())
    at.batcher.withdraw(frame)
    assert at.taken() == first[:8]
    frame = at.put(OTHER, source=camera)
    assert at.taken() == first[8:]
    assert at.taken() == [frame]


def test_bookkeeping_of_turns_does_not_outlive_the_queue():
    at = bench()
    for spec in (LAYER, OTHER):
        entries = many(at, 3, Source(), spec)
        for entry in entries:
            at.batcher.withdraw(entry)
            assert entry.image is None
    assert len(at.batcher) == at.batcher.waiting == 0
    # No bucket keeps its turn from before: they go in the order of what comes now.
    new = [at.put(spec) for spec in (OTHER, LAYER)]
    assert [at.taken() for _ in new] == [[entry] for entry in new]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(
    windows=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    batch_size=st.integers(1, 16),
    arrivals=st.lists(st.integers(0, 7), max_size=60),
)
def test_shares_of_sources_that_wait_all_the_while_differ_by_one_at_most(windows, batch_size, arrivals):
    at = bench(max_batch_size=batch_size, max_queue_length=100)
    sources = [Source() for _ in windows]
    waiting = Counter(dict.fromkeys(sources, 0))
    for source, window in zip(sources, windows, strict=True):
        many(at, window, source)
        waiting[source] += window
    # `since[pair]`: how often each of two sources was served since both wait.
    since = {(a, b): [0, 0] for a in sources for b in sources if a is not b}
    for arrival in arrivals:
        if arrival < len(sources):
            many(at, 1, sources[arrival])
            waiting[sources[arrival]] += 1
        else:
            at.put()
        for entry in at.taken() if at.batcher.waiting else []:
            if entry.source is None:
                continue
            waiting[entry.source] -= 1
            for (a, b), counts in since.items():
                if entry.source in (a, b):
                    counts[0 if entry.source is a else 1] += 1
                if not (waiting[a] and waiting[b]):
                    counts[:] = [0, 0]
                assert abs(counts[0] - counts[1]) <= 1


def test_images_that_take_long_are_few_in_a_batch_and_those_of_others_many():
    at = bench()
    pace, pixel_count = at.batcher.pace, IMAGE.pixel_count
    pace.learn_batch(OTHER, BATCH, pixel_count, BATCH * STEP_S / 8)
    pace.learn_batch(LAYER, BATCH, pixel_count, BATCH * STEP_S / 2)
    slow, usual = many(at, 4, Source()), many(at, BATCH, Source(), OTHER)
    assert [at.taken() for _ in range(3)] == [slow[:2], usual, slow[2:]]
