"""Load by calls on a clock of our own: nothing sleeps, everything is exact."""

import asyncio
import itertools

import numpy as np
import pytest

from heatlens import Timing, UnavailableError
from heatlens._cli.load import closed_loop, constant_arrivals, open_loop, poisson_arrivals

TIMING = Timing(queue_ms=1.0, preprocess_ms=2.0, compute_ms=3.0, batch_size=4)


class Clock:
    """Time that passes only when somebody sleeps or works."""

    def __init__(self):
        self.time = 100.0

    def now(self):
        return self.time

    async def sleep(self, seconds):
        self.time += seconds
        await asyncio.sleep(0)


def test_constant_arrivals():
    assert list(itertools.islice(constant_arrivals(4), 5)) == [0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_have_the_rate_and_the_spread():
    starts = np.array(list(itertools.islice(poisson_arrivals(50, seed=1), 20_000)))
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    # Exponential: mean and standard deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(0.02, rel=0.03)
    assert gaps.std() == pytest.approx(0.02, rel=0.03)
    again = list(itertools.islice(poisson_arrivals(50, seed=1), 3))
    assert starts[:3].tolist() == again


async def test_closed_loop_stops_after_the_requests():
    clock, open_now, most_open, done = Clock(), 0, 0, []

    async def call():
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        await asyncio.sleep(0)
        clock.time += 0.1
        open_now -= 1
        return TIMING

    trace, elapsed_s = await closed_loop(
        call, concurrency=3, requests=10, duration_s=None, on_done=lambda: done.append(1), now=clock.now
    )
    assert len(trace.samples) == len(done) == 10
    assert most_open == 3
    assert elapsed_s == pytest.approx(1.0)


async def test_closed_loop_stops_after_the_duration():
    clock = Clock()

    async def call():
        clock.time += 0.25
        return TIMING

    trace, _ = await closed_loop(call, concurrency=1, requests=None, duration_s=1.0, now=clock.now)
    assert len(trace.samples) == 4


async def test_open_loop_charges_a_stall_to_every_call_it_delayed():
    clock = Clock()
    calls = 0

    async def call():
        nonlocal calls
        calls += 1
        # The first call stops the world for a second, the others are instant.
        clock.time += 1.0 if calls == 1 else 0.0
        return TIMING

    trace, _ = await open_loop(
        call, arrivals=constant_arrivals(10), requests=5, duration_s=None, now=clock.now, sleep=clock.sleep
    )
    # Scheduled at 0, 0.1 ... 0.4. The first is started while the second is awaited, at 0.1.
    latencies = [sample.latency_s for sample in trace.samples]
    assert latencies == pytest.approx([1.1, 1.0, 0.9, 0.8, 0.7], abs=0.11)
    assert min(latencies) > 0.5
    assert trace.lags_s[-1] > 0.5


async def test_open_loop_stops_after_the_duration_and_waits_for_all():
    clock = Clock()

    async def call():
        return TIMING

    trace, _ = await open_loop(
        call, arrivals=constant_arrivals(10), requests=None, duration_s=0.95, now=clock.now, sleep=clock.sleep
    )
    assert len(trace.samples) == 10


async def test_failures_are_counted_not_raised():
    clock = Clock()

    async def call():
        raise UnavailableError("gone")

    trace, _ = await closed_loop(call, concurrency=2, requests=3, duration_s=None, now=clock.now)
    assert (trace.captured, trace.sent) == (3, 3)
    assert [(sample.code, sample.timing) for sample in trace.samples] == [("UNAVAILABLE", None)] * 3


async def test_a_bug_is_raised():
    async def call():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await closed_loop(call, concurrency=1, requests=1, duration_s=None)
