"""Load by streams and its statistics; knows nothing of the command line.

Open loop: a source captures frame k at its start + k / fps, whatever the server does, as a camera does, and a frame's
age counts from that moment, so that a late server is charged for every frame that it made wait (see `load`). Frames
that wait here are numbers, not copies: however late the server is, a source holds no memory for them.

Closed loop: a frame is captured when the window lets it in, so the server is kept as busy as the windows allow.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from heatlens._cli.load import Latency, Now, Sleep, batch_size_of, lag_of, latency_of, mean_of
from heatlens._exceptions import HeatlensError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult, Timing

EXPLAINED, DROPPED, SKIPPED = "OK", "DROPPED", "SKIPPED"


class FrameStream(Protocol):
    """An open stream, as far as sources use it. `heatlens.AsyncStream` is one."""

    @property
    def window(self) -> int:
        """Most unanswered frames."""

    async def send(self, frame: ImageSource, *, frame_id: int, capture_time: float) -> int:
        """Send a frame; may wait for room."""

    async def finish(self) -> None:
        """Say that no frames follow."""

    def __aiter__(self) -> AsyncIterator[FrameResult]:
        """The answers, to the end."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What the sources do, all alike.

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


@dataclass(frozen=True, slots=True)
class FrameSample:
    """One answer.

    Attributes:
        age_s: from the capture to the answer, in seconds.
        code: "OK", "DROPPED", "SKIPPED" or the status code's name.
        timing: the server's timing; None if the frame was not explained.
    """

    age_s: float
    code: str
    timing: Timing | None


@dataclass(slots=True)
class Trace:
    """What one stream did.

    Attributes:
        captured: frames captured.
        sent: frames sent.
        samples: the answers, in order.
        lags_s: for each frame due, how late this client itself was, in seconds: waiting for a full window is not
            counted.
        error: what broke the stream; None if nothing did.
    """

    captured: int = 0
    sent: int = 0
    samples: list[FrameSample] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    error: HeatlensError | None = None


@dataclass(frozen=True, slots=True)
class StreamShare:
    """What came of frames: one stream's, or all.

    `captured` is the sum of the numbers after it, but for `explained_per_s`.

    Attributes:
        captured: frames captured in the time of the run.
        explained: frames answered with a result.
        explained_per_s: the same per second of the whole run.
        dropped: frames that gave way to newer ones.
        skipped: frames that the server left out as it was asked to.
        failed: frames that failed, by status code; those that a broken stream left unanswered have its code.
        unsent: frames not sent: they still waited here when the time was over, or the stream had broken.
        age: from the capture to the answer, of the frames explained; None if none was.
    """

    captured: int
    explained: int
    explained_per_s: float
    dropped: int
    skipped: int
    failed: dict[str, int]
    unsent: int
    age: Latency | None


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What a run showed.

    Attributes:
        elapsed_s: from the first capture to the last answer.
        total: all streams together.
        per_stream: each stream.
        broken: what broke a stream, by status code.
        mean_batch_size: images per batch run, not per image.
        mean_queue_ms: mean time in the server's queue.
        mean_preprocess_ms: mean time to decode and resize.
        mean_compute_ms: mean time of the batches that held the frames.
        p99_lag_ms: how late this client itself was; large means that the client, not the server, was measured.
    """

    elapsed_s: float
    total: StreamShare
    per_stream: tuple[StreamShare, ...]
    broken: dict[str, int]
    mean_batch_size: float | None
    mean_queue_ms: float | None
    mean_preprocess_ms: float | None
    mean_compute_ms: float | None
    p99_lag_ms: float


async def run_streams(
    streams: Sequence[FrameStream],
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
        _Run(stream, sources, index=index, count=len(streams), begin_s=begin_s, now=now)
        for index, stream in enumerate(streams)
    ]
    async with asyncio.TaskGroup() as tasks:
        for run in runs:
            tasks.create_task(run.feed(sleep))
            tasks.create_task(run.collect(on_answer))
    return [run.trace for run in runs], now() - begin_s


class _Run:
    """One stream with its source."""

    def __init__(
        self, stream: FrameStream, sources: Sources, *, index: int, count: int, begin_s: float, now: Now
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
                self.trace.samples.append(FrameSample(age_s, _code_of(item), timing))
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
        """Both sides learn of it; the first one says so."""
        if self.trace.error is None:
            self.trace.error = error


def _code_of(item: FrameResult) -> str:
    if item.skipped:
        return SKIPPED
    if item.dropped:
        return DROPPED
    return EXPLAINED if item.error is None else item.error.code.value


def summarise_streams(traces: Sequence[Trace], elapsed_s: float) -> StreamReport:
    """Return the statistics of a run."""
    timings = [sample.timing for trace in traces for sample in trace.samples if sample.timing is not None]
    return StreamReport(
        elapsed_s=elapsed_s,
        total=_share(traces, elapsed_s),
        per_stream=tuple(_share([trace], elapsed_s) for trace in traces),
        broken=_sorted(Counter(trace.error.code.value for trace in traces if trace.error is not None)),
        mean_batch_size=batch_size_of(timings),
        mean_queue_ms=mean_of([timing.queue_ms for timing in timings]),
        mean_preprocess_ms=mean_of([timing.preprocess_ms for timing in timings]),
        mean_compute_ms=mean_of([timing.compute_ms for timing in timings]),
        p99_lag_ms=lag_of([lag_s for trace in traces for lag_s in trace.lags_s]),
    )


def _share(traces: Sequence[Trace], elapsed_s: float) -> StreamShare:
    counts = Counter(sample.code for trace in traces for sample in trace.samples)
    explained, dropped, skipped = (counts.pop(code, 0) for code in (EXPLAINED, DROPPED, SKIPPED))
    for trace in traces:
        # A stream that did not break answers all.
        if trace.error is not None and trace.sent > len(trace.samples):
            counts[trace.error.code.value] += trace.sent - len(trace.samples)
    ages_s = [sample.age_s for trace in traces for sample in trace.samples if sample.code == EXPLAINED]
    return StreamShare(
        captured=sum(trace.captured for trace in traces),
        explained=explained,
        explained_per_s=explained / elapsed_s if elapsed_s > 0 else 0.0,
        dropped=dropped,
        skipped=skipped,
        failed=_sorted(counts),
        unsent=sum(trace.captured - trace.sent for trace in traces),
        age=latency_of(ages_s),
    )


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
