"""Load generation on a clock of our own: nothing sleeps, everything is exact."""

import asyncio
import itertools

import numpy as np
import pytest

from heatlens import Timing, UnavailableError
from heatlens._cli.load import Sample, closed_loop, constant_arrivals, open_loop, poisson_arrivals, summarise

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

    samples, elapsed_s = await closed_loop(
        call, concurrency=3, requests=10, duration_s=None, on_done=lambda: done.append(1), now=clock.now
    )
    assert len(samples) == len(done) == 10
    assert most_open == 3
    assert elapsed_s == pytest.approx(1.0)


async def test_closed_loop_stops_after_the_duration():
    clock = Clock()

    async def call():
        clock.time += 0.25
        return TIMING

    samples, _ = await closed_loop(call, concurrency=1, requests=None, duration_s=1.0, now=clock.now)
    assert len(samples) == 4


async def test_open_loop_charges_a_stall_to_every_call_it_delayed():
    clock = Clock()
    calls = 0

    async def call():
        nonlocal calls
        calls += 1
        # The first call stops the world for a second, the others are instant.
        clock.time += 1.0 if calls == 1 else 0.0
        return TIMING

    samples, _ = await open_loop(
        call, arrivals=constant_arrivals(10), requests=5, duration_s=None, now=clock.now, sleep=clock.sleep
    )
    # Scheduled at 0, 0.1 ... 0.4. The first is started while the second is awaited, at 0.1.
    latencies = [sample.latency_s for sample in samples]
    assert latencies == pytest.approx([1.1, 1.0, 0.9, 0.8, 0.7], abs=0.11)
    assert min(latencies) > 0.5
    assert samples[-1].lag_s > 0.5


async def test_open_loop_stops_after_the_duration_and_waits_for_all():
    clock = Clock()

    async def call():
        return TIMING

    samples, _ = await open_loop(
        call, arrivals=constant_arrivals(10), requests=None, duration_s=0.95, now=clock.now, sleep=clock.sleep
    )
    assert len(samples) == 10


async def test_failures_are_counted_not_raised():
    clock = Clock()

    async def call():
        raise UnavailableError("gone")

    samples, elapsed_s = await closed_loop(call, concurrency=2, requests=3, duration_s=None, now=clock.now)
    report = summarise(samples, elapsed_s)
    assert report.codes == {"UNAVAILABLE": 3}
    assert (report.latency, report.mean_batch_size, report.throughput_per_s) == (None, None, 0.0)


async def test_a_bug_is_raised():
    async def call():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        await closed_loop(call, concurrency=1, requests=1, duration_s=None)


def test_statistics():
    samples = [Sample(latency_s=ms / 1e3, lag_s=0.0, code="OK", timing=TIMING) for ms in range(1, 101)]
    samples.append(Sample(latency_s=9.0, lag_s=0.5, code="RESOURCE_EXHAUSTED", timing=None))
    report = summarise(samples, 2.0)
    assert report.requests == 101
    assert report.throughput_per_s == 50
    assert report.codes == {"OK": 100, "RESOURCE_EXHAUSTED": 1}
    assert report.latency.mean_ms == pytest.approx(50.5)
    assert report.latency.p50_ms == pytest.approx(50.5)
    assert report.latency.p90_ms == pytest.approx(90.1)
    assert report.latency.p95_ms == pytest.approx(95.05)
    assert report.latency.p99_ms == pytest.approx(99.01)
    assert report.latency.max_ms == pytest.approx(100)
    assert (report.mean_queue_ms, report.mean_preprocess_ms, report.mean_compute_ms) == (1.0, 2.0, 3.0)


def test_batch_size_is_per_batch_not_per_image():
    sizes = [8] * 8 + [2] * 2
    samples = [
        Sample(0.1, 0.0, "OK", Timing(queue_ms=0, preprocess_ms=0, compute_ms=0, batch_size=size)) for size in sizes
    ]
    assert summarise(samples, 1.0).mean_batch_size == pytest.approx(5.0)


def test_nothing_is_no_division_by_zero():
    report = summarise([], 0.0)
    assert (report.requests, report.latency, report.p99_lag_ms) == (0, None, 0.0)
