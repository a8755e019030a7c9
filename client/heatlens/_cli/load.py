"""Load by calls and by streams; knows nothing of the command line.

An open loop starts calls on a schedule whatever the server does, as users do, and counts latency from the scheduled
time, so that a stall is charged to every call that it delayed ("coordinated omission", G. Tene, "How NOT to Measure
Latency", 2013). In the same way a source captures frame k at its start + k / fps, as a camera does, and a frame's age
counts from that moment. Frames that wait here are numbers, not copies: a late server costs a source no memory.

A closed loop keeps N calls open, and captures a frame when the window lets it in: it measures capacity, and slows down
with the server.
"""

import asyncio
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from heatlens._cli.report import DROPPED, EXPLAINED, SKIPPED, Sample, Trace
from heatlens._exceptions import HeatlensError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult, Timing
from heatlens._stream.async_stream import AsyncStream

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


@dataclass(frozen=True, slots=True)
class Sources:
    """How frames are captured and sent, the same for every stream: each has a source.

    Attributes:
        frames: sent in turn; source i begins with the i-th.
        fps: frames per second of each source; None: as fast as the window allows.
        duration_s: how long frames are captured, in seconds.
        drop_oldest: whether the streams drop frames when there are too many; if not, `send` waits.
    """

    frames: Sequence[ImageSource]
    fps: float | None
    duration_s: float
    drop_oldest: bool

    def __post_init__(self) -> None:
        if self.fps is None and self.drop_oldest:
            raise ValueError("without a rate, frames that may be dropped would come without end")

    def offset_s(self, source: int, count: int) -> float:
        """When source number `source` of `count` captures its first frame: the sources take even turns."""
        return 0.0 if self.fps is None else source / (count * self.fps)

    def captures(self, source: int, count: int) -> int:
        """How many frames an open-loop source captures before the time is over."""
        if self.fps is None:
            raise ValueError("a closed loop captures as many frames as it can send")
        # A product such as 3 * 0.1 must not make one frame too many.
        return max(0, math.ceil((self.duration_s - self.offset_s(source, count)) * self.fps - 1e-9))

    def total(self, count: int) -> int | None:
        """How many frames `count` sources capture; None in a closed loop, where that depends on the server."""
        return None if self.fps is None else sum(self.captures(source, count) for source in range(count))


async def run_streams(
    streams: Sequence[AsyncStream],
    sources: Sources,
    *,
    on_answer: Callable[[], None] = lambda: None,
    now: Now = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> tuple[list[Trace], float]:
    """Feed every stream until the time is over, then wait for the answers that are due.

    A stream that breaks harms no other, and is not opened again.

    Args:
        streams: open streams without frames so far.
        sources: what feeds them.
        on_answer: called after each answer.
        now: the clock, in seconds.
        sleep: waits for seconds of that clock.

    Returns:
        What each stream did, and the seconds from start to the last answer.
    """
    begin_s = now()
    runs = [
        _StreamRun(stream, sources, index=index, count=len(streams), begin_s=begin_s, now=now)
        for index, stream in enumerate(streams)
    ]
    async with asyncio.TaskGroup() as tasks:
        for run in runs:
            tasks.create_task(run.feed(sleep))
            tasks.create_task(run.collect(on_answer))
    return [run.trace for run in runs], now() - begin_s


class _StreamRun:
    """One stream and the source that feeds it."""

    def __init__(
        self, stream: AsyncStream, sources: Sources, *, index: int, count: int, begin_s: float, now: Now
    ) -> None:
        self.trace = Trace()
        self._stream = stream
        self._sources = sources
        self._index = index
        self._count = count
        self._begin_s = begin_s
        self._end_s = begin_s + sources.duration_s
        self._now = now
        # From this clock to the time of day, which frames carry.
        self._epoch_s = time.time() - begin_s
        self._captured_s: dict[int, float] = {}
        """When the frames without an answer were captured: as many as the SDK lets wait."""

    async def feed(self, sleep: Sleep) -> None:
        """Capture and send."""
        try:
            await (self._feed_closed() if self._sources.fps is None else self._feed_open(self._sources.fps, sleep))
        except HeatlensError as error:
            self._broke(error)
        # Broken meanwhile: `collect` has the reason.
        with suppress(HeatlensError):
            await self._stream.finish()

    async def collect(self, on_answer: Callable[[], None]) -> None:
        """Take the answers."""
        try:
            async for item in self._stream:
                age_s = self._now() - self._captured_s.pop(item.frame_id)
                timing = None if item.result is None else item.result.timing
                self.trace.samples.append(Sample(age_s, _code_of(item), timing))
                on_answer()
        except HeatlensError as error:
            self._broke(error)

    async def _feed_open(self, fps: float, sleep: Sleep) -> None:
        first_s = self._begin_s + self._sources.offset_s(self._index, self._count)
        self.trace.captured = self._sources.captures(self._index, self._count)
        freed_s = first_s
        for frame_id in range(self.trace.captured):
            captured_s = first_s + frame_id / fps
            early_s = captured_s - self._now()
            if early_s <= 0 and self._now() >= self._end_s:
                # What still waits now stays unsent.
                return
            # Even when late, give way to the answers.
            await sleep(max(early_s, 0.0))
            called_s = self._now()
            self.trace.lags_s.append(called_s - max(captured_s, freed_s))
            full = len(self._captured_s) >= self._stream.window
            self._captured_s[frame_id] = captured_s
            try:
                await self._send(frame_id, captured_s)
            except HeatlensError:
                del self._captured_s[frame_id]
                raise
            if full and not self._sources.drop_oldest:
                freed_s = self._now()

    async def _feed_closed(self) -> None:
        while self._now() < self._end_s:
            frame_id = self.trace.sent
            await self._send(frame_id, self._now())
            # Nothing else ran since the window let it in, no answer either.
            self._captured_s[frame_id] = self._now()
            self.trace.captured += 1

    async def _send(self, frame_id: int, captured_s: float) -> None:
        frames = self._sources.frames
        frame = frames[(self._index + frame_id) % len(frames)]
        await self._stream.send(frame, frame_id=frame_id, capture_time=self._epoch_s + captured_s)
        self.trace.sent += 1

    def _broke(self, error: HeatlensError) -> None:
        """Keep the first error: sending and receiving both fail when a stream breaks."""
        if self.trace.error is None:
            self.trace.error = error


def _code_of(item: FrameResult) -> str:
    if item.skipped:
        return SKIPPED
    if item.dropped:
        return DROPPED
    return EXPLAINED if item.error is None else item.error.code.value
