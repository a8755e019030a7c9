"""Load generation and its statistics; knows nothing of the command line.

A closed loop keeps N calls open: it measures capacity, and slows down with the server. An open loop starts calls on
a schedule whatever the server does, as users do, and counts latency from the scheduled time, so that a stall is
charged to every call that it delayed ("coordinated omission", G. Tene, "How NOT to Measure Latency", 2013).
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heatlens._exceptions import HeatlensError
from heatlens._results.results import Timing

Call = Callable[[], Awaitable[Timing]]
Now = Callable[[], float]
Sleep = Callable[[float], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One call.

    Attributes:
        latency_s: from the scheduled start to the answer, in seconds.
        lag_s: from the scheduled to the real start: how late this client itself was.
        code: "OK" or the status code's name.
        timing: the server's timing; None if the call failed.
    """

    latency_s: float
    lag_s: float
    code: str
    timing: Timing | None


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies of the calls that succeeded, in milliseconds."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a run showed.

    Attributes:
        requests: calls made.
        elapsed_s: from the first scheduled start to the last answer.
        throughput_per_s: calls that succeeded per second.
        codes: number of calls by status code.
        latency: None if none succeeded.
        mean_batch_size: images per batch run, not per image: a batch of 8 and one of 2 make 5.
        mean_queue_ms: mean time in the server's queue.
        mean_preprocess_ms: mean time to decode and resize.
        mean_compute_ms: mean time of the batches that held the images.
        p99_lag_ms: how late this client started calls; large means that the client, not the server, was measured.
    """

    requests: int
    elapsed_s: float
    throughput_per_s: float
    codes: dict[str, int]
    latency: Latency | None
    mean_batch_size: float | None
    mean_queue_ms: float | None
    mean_preprocess_ms: float | None
    mean_compute_ms: float | None
    p99_lag_ms: float


def constant_arrivals(rate_per_s: float) -> Iterator[float]:
    """Yield start times in seconds, evenly spaced, from 0 on."""
    count = 0
    while True:
        yield count / rate_per_s
        count += 1


def poisson_arrivals(rate_per_s: float, seed: int) -> Iterator[float]:
    """Yield start times in seconds of a Poisson process: independent exponential gaps."""
    generator = np.random.default_rng(seed)
    start_s = 0.0
    while True:
        start_s += float(generator.exponential(1 / rate_per_s))
        yield start_s


async def closed_loop(
    call: Call,
    *,
    concurrency: int,
    requests: int | None,
    duration_s: float | None,
    on_done: Callable[[], None] = lambda: None,
    now: Now = time.perf_counter,
) -> tuple[list[Sample], float]:
    """Keep `concurrency` calls open until `requests` were made or `duration_s` is over, whichever is first.

    Returns:
        The samples, and the seconds from start to the last answer.
    """
    samples: list[Sample] = []
    begin = now()
    started = 0

    async def worker() -> None:
        nonlocal started
        while (requests is None or started < requests) and (duration_s is None or now() - begin < duration_s):
            started += 1
            samples.append(await _measure(call, scheduled=now(), now=now))
            on_done()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return samples, now() - begin


async def open_loop(
    call: Call,
    *,
    arrivals: Iterator[float],
    requests: int | None,
    duration_s: float | None,
    on_done: Callable[[], None] = lambda: None,
    now: Now = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> tuple[list[Sample], float]:
    """Start a call at every arrival, whatever became of the earlier ones, then wait for all answers.

    Returns:
        The samples, and the seconds from start to the last answer.
    """
    samples: list[Sample] = []
    begin = now()

    async def one(scheduled: float) -> None:
        samples.append(await _measure(call, scheduled=scheduled, now=now))
        on_done()

    async with asyncio.TaskGroup() as calls:
        for count, offset_s in enumerate(arrivals):
            if (requests is not None and count >= requests) or (duration_s is not None and offset_s >= duration_s):
                break
            # Even when late, give way to the calls under way.
            await sleep(max(begin + offset_s - now(), 0.0))
            calls.create_task(one(begin + offset_s))
    return samples, now() - begin


async def _measure(call: Call, *, scheduled: float, now: Now) -> Sample:
    lag_s = now() - scheduled
    timing: Timing | None = None
    try:
        timing = await call()
        code = "OK"
    except HeatlensError as error:
        code = error.code.value
    return Sample(latency_s=now() - scheduled, lag_s=lag_s, code=code, timing=timing)


def summarise(samples: Sequence[Sample], elapsed_s: float) -> Report:
    """Return the statistics of a run."""
    answered = [sample for sample in samples if sample.code == "OK"]
    timings = [sample.timing for sample in samples if sample.timing is not None]
    return Report(
        requests=len(samples),
        elapsed_s=elapsed_s,
        throughput_per_s=len(answered) / elapsed_s if elapsed_s > 0 else 0.0,
        codes=dict(sorted(Counter(sample.code for sample in samples).items())),
        latency=latency_of([sample.latency_s for sample in answered]),
        mean_batch_size=batch_size_of(timings),
        mean_queue_ms=mean_of([timing.queue_ms for timing in timings]),
        mean_preprocess_ms=mean_of([timing.preprocess_ms for timing in timings]),
        mean_compute_ms=mean_of([timing.compute_ms for timing in timings]),
        p99_lag_ms=lag_of([sample.lag_s for sample in samples]),
    )


def latency_of(latencies_s: Sequence[float]) -> Latency | None:
    """Return the statistics of latencies given in seconds; None if there are none.

    Percentiles are interpolated linearly (numpy's default).
    """
    if not latencies_s:
        return None
    latencies_ms = np.array(latencies_s) * 1e3
    p50, p90, p95, p99 = (float(value) for value in np.percentile(latencies_ms, [50, 90, 95, 99]))
    return Latency(
        mean_ms=float(latencies_ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(latencies_ms.max()),
    )


def lag_of(lags_s: Sequence[float]) -> float:
    """Return the 99th percentile, in milliseconds, of lags in seconds; 0.0 if there are none."""
    return float(np.percentile(lags_s, 99)) * 1e3 if lags_s else 0.0


def batch_size_of(timings: Sequence[Timing]) -> float | None:
    """Return the mean size of the batches that ran, not of the batches that images were in; None without any."""
    # An image in a batch of n stands for 1/n of a batch.
    shares = [1 / timing.batch_size for timing in timings if timing.batch_size > 0]
    return len(shares) / sum(shares) if shares else None


def mean_of(values: Sequence[float]) -> float | None:
    """Return the mean; None if there are no values."""
    return float(np.mean(values)) if values else None
