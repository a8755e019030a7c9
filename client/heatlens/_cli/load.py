"""Load by calls; knows nothing of the command line.

A closed loop keeps N calls open: it measures capacity, and slows down with the server. An open loop starts calls on
a schedule whatever the server does, as users do, and counts latency from the scheduled time, so that a stall is
charged to every call that it delayed ("coordinated omission", G. Tene, "How NOT to Measure Latency", 2013).
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator

import numpy as np

from heatlens._cli.report import EXPLAINED, Sample, Trace
from heatlens._exceptions import HeatlensError
from heatlens._results.results import Timing

Call = Callable[[], Awaitable[Timing]]
Now = Callable[[], float]
Sleep = Callable[[float], Awaitable[object]]


def constant_arrivals(rate_per_s: float) -> Iterator[float]:
    """Yield start times in seconds, evenly spaced, from 0 on."""
    for count in itertools.count():
        yield count / rate_per_s


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
) -> tuple[Trace, float]:
    """Keep `concurrency` calls open until `requests` were made or `duration_s` is over, whichever is first.

    Returns:
        What the calls did, and the seconds from start to the last answer.
    """
    trace = Trace()
    begin_s = now()

    async def worker() -> None:
        while (requests is None or trace.sent < requests) and (duration_s is None or now() - begin_s < duration_s):
            await _measure(call, trace, scheduled_s=now(), now=now)
            on_done()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return trace, now() - begin_s


async def open_loop(
    call: Call,
    *,
    arrivals: Iterator[float],
    requests: int | None,
    duration_s: float | None,
    on_done: Callable[[], None] = lambda: None,
    now: Now = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> tuple[Trace, float]:
    """Start a call at every arrival, whatever became of the earlier ones, then wait for all answers.

    Returns:
        What the calls did, and the seconds from start to the last answer.
    """
    trace = Trace()
    begin_s = now()

    async def one(scheduled_s: float) -> None:
        await _measure(call, trace, scheduled_s=scheduled_s, now=now)
        on_done()

    async with asyncio.TaskGroup() as calls:
        for offset_s in itertools.islice(arrivals, requests):
            if duration_s is not None and offset_s >= duration_s:
                break
            # Even when late, give way to the calls under way.
            await sleep(max(begin_s + offset_s - now(), 0.0))
            calls.create_task(one(begin_s + offset_s))
    return trace, now() - begin_s


async def _measure(call: Call, trace: Trace, *, scheduled_s: float, now: Now) -> None:
    trace.captured += 1
    trace.sent += 1
    trace.lags_s.append(now() - scheduled_s)
    timing, code = None, EXPLAINED
    try:
        timing = await call()
    except HeatlensError as error:
        code = error.code.value
    trace.samples.append(Sample(now() - scheduled_s, code, timing))
