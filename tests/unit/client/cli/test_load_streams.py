"""Load by streams on virtual time: a server that takes so long per frame, and nothing sleeps."""

import asyncio
import collections
import heapq
import itertools

import pytest

from heatlens import FrameResult, InvalidArgumentError, PixelBox, ResourceExhaustedError, Result, Timing
from heatlens import UnavailableError as Unavailable
from heatlens._cli.load import Sources, run_streams
from heatlens._cli.report import summarise
from heatlens._results.results import FRAME_DROPPED

TIMING = Timing(queue_ms=1.0, preprocess_ms=2.0, compute_ms=3.0, batch_size=4)
RESULT = Result((), (), PixelBox(0, 0, 1, 1), None, "tiny", "1", TIMING)
DROPPED = ResourceExhaustedError("newer frames came", reason=FRAME_DROPPED)


class VirtualTime:
    """Time that passes when everybody waits for it."""

    def __init__(self):
        self.time = 100.0
        self._sleepers = []
        self._numbers = itertools.count()

    def now(self):
        return self.time

    async def sleep(self, seconds):
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.time + seconds, next(self._numbers), future))
        await future

    async def run(self, coroutine):
        task = asyncio.create_task(coroutine)
        while True:
            for _ in range(50):
                await asyncio.sleep(0)
            if task.done():
                return task.result()
            assert self._sleepers, "everybody waits, and for no time"
            due, _, future = heapq.heappop(self._sleepers)
            # Those who work make everybody late.
            self.time = max(self.time, due)
            future.set_result(None)


class FakeStream:
    """A window of frames before a server that explains one frame in `service_s`; `outcomes` says what it answers.

    Sending takes `work_s` of this client's time. With `drops`, it never waits.
    """

    def __init__(self, clock, *, window=1, service_s=0.0, outcomes=None, breaks_at=None, work_s=0.0, drops=False):
        self.window = window
        self.log = []
        self.most_waiting = 0
        self._clock = clock
        self._service_s = service_s
        self._outcomes = outcomes or {}
        self._breaks_at = breaks_at
        self._work_s = work_s
        self._drops = drops
        self._frames = collections.deque()
        self._changed = asyncio.Event()
        self._finished = False
        self._broken = None
        self._waiting = 0

    async def send(self, frame, *, frame_id, capture_time):
        self._clock.time += self._work_s
        self._waiting += 1
        self.most_waiting = max(self.most_waiting, self._waiting)
        while not self._drops and len(self._frames) >= self.window and self._broken is None:
            await self._wait()
        self._waiting -= 1
        if self._broken is not None:
            raise self._broken
        self.log.append((frame_id, frame, self._clock.now()))
        self._frames.append(frame_id)
        self._tell()
        return frame_id

    async def finish(self):
        self._finished = True
        self._tell()

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self._frames:
            if self._finished:
                raise StopAsyncIteration
            await self._wait()
        frame_id = self._frames[0]
        await self._clock.sleep(self._service_s)
        if frame_id == self._breaks_at:
            self._broken = Unavailable("gone")
            self._tell()
            raise self._broken
        self._frames.popleft()
        self._tell()
        outcome = self._outcomes.get(frame_id, RESULT)
        error = outcome if isinstance(outcome, Exception) else None
        result = outcome if outcome is RESULT else None
        return FrameResult(frame_id, None, result, error, outcome == "skipped", 0.0)

    async def _wait(self):
        await self._changed.wait()

    def _tell(self):
        self._changed.set()
        self._changed.clear()


def sources(fps, duration_s, *, frames=(b"a",), drop_oldest=False):
    return Sources(frames, fps=fps, duration_s=duration_s, drop_oldest=drop_oldest)


async def play(clock, streams, load, **options):
    return await clock.run(run_streams(streams, load, now=clock.now, sleep=clock.sleep, **options))


async def test_sources_capture_on_schedule_and_take_even_turns():
    clock = VirtualTime()
    streams = [FakeStream(clock, window=8) for _ in range(2)]
    traces, elapsed_s = await play(clock, streams, sources(10, 0.3, frames=(b"a", b"b", b"c")))
    times = [[time - 100 for _, _, time in stream.log] for stream in streams]
    assert times[0] == pytest.approx([0.0, 0.1, 0.2])
    assert times[1] == pytest.approx([0.05, 0.15, 0.25])
    # Each begins with another frame.
    assert [[frame for _, frame, _ in stream.log] for stream in streams] == [[b"a", b"b", b"c"], [b"b", b"c", b"a"]]
    assert [trace.captured for trace in traces] == [3, 3]
    assert [sample.latency_s for trace in traces for sample in trace.samples] == pytest.approx([0.0] * 6)
    assert elapsed_s == pytest.approx(0.25)


async def test_a_late_server_is_charged_for_all_that_waits_and_slows_no_source():
    clock = VirtualTime()
    stream = FakeStream(clock, service_s=0.2)
    done = []
    [trace], elapsed_s = await play(clock, [stream], sources(10, 1.0), on_answer=lambda: done.append(1))
    # Captured every 0.1 s, explained every 0.2 s: frame k is answered at 0.2 * (k + 1).
    assert [sample.latency_s for sample in trace.samples] == pytest.approx([0.2 + 0.1 * k for k in range(6)])
    assert (trace.captured, trace.sent, len(done)) == (10, 6, 6)
    assert elapsed_s == pytest.approx(1.2)
    # The server was late, not this client; and what waits is one frame, the others are numbers.
    assert trace.lags_s == pytest.approx([0.0] * 6)
    assert stream.most_waiting == 1
    report = summarise([trace], elapsed_s)
    assert (report.total.explained, report.total.unsent) == (6, 4)


async def test_a_slow_stream_harms_no_other():
    clock = VirtualTime()
    streams = [FakeStream(clock, service_s=0.5), FakeStream(clock, service_s=0.01)]
    traces, _ = await play(clock, streams, sources(10, 1.0))
    assert [len(trace.samples) for trace in traces] == [3, 10]
    assert [sample.latency_s for sample in traces[1].samples] == pytest.approx([0.01] * 10)


async def test_a_late_client_says_so():
    clock = VirtualTime()
    stream = FakeStream(clock, window=100)

    def work():
        # The first answer stops the world for longer than two frames.
        if clock.time < 100.1:
            clock.time += 0.25

    [trace], _ = await play(clock, [stream], sources(10, 0.5), on_answer=work)
    assert trace.lags_s == pytest.approx([0.0, 0.15, 0.05, 0.0, 0.0])


async def test_a_full_window_excuses_no_client_that_does_not_wait_for_it():
    clock = VirtualTime()
    stream = FakeStream(clock, service_s=10.0, work_s=0.25, drops=True)
    [trace], _ = await play(clock, [stream], sources(8, 1.0, drop_oldest=True))
    # A frame every 0.125 s, and 0.25 s of work for each.
    assert trace.lags_s == pytest.approx([0.0, 0.125, 0.25, 0.375])
    assert (trace.captured, trace.sent) == (8, 4)


async def test_closed_loop_keeps_the_window_full():
    clock = VirtualTime()
    stream = FakeStream(clock, window=2, service_s=0.125)
    [trace], elapsed_s = await play(clock, [stream], sources(None, 1.0))
    ages_s = [sample.latency_s for sample in trace.samples]
    # Captured when the window let it in: then one frame is before it.
    assert ages_s == [0.125, *[0.25] * 9]
    assert trace.captured == trace.sent == 10
    assert elapsed_s == 1.25


async def test_answers_are_told_apart():
    clock = VirtualTime()
    outcomes = {1: DROPPED, 2: "skipped", 3: InvalidArgumentError("bad"), 4: Unavailable("draining")}
    [trace], elapsed_s = await play(clock, [FakeStream(clock, outcomes=outcomes)], sources(10, 0.6))
    share = summarise([trace], elapsed_s).total
    assert (share.captured, share.explained, share.dropped, share.skipped, share.unsent) == (6, 2, 1, 1, 0)
    assert share.failed == {"INVALID_ARGUMENT": 1, "UNAVAILABLE": 1}


async def test_a_broken_stream_is_counted_and_harms_no_other():
    clock = VirtualTime()
    streams = [FakeStream(clock, window=2, service_s=0.15, breaks_at=2), FakeStream(clock)]
    traces, elapsed_s = await play(clock, streams, sources(10, 1.0))
    report = summarise(traces, elapsed_s)
    assert report.broken == {"UNAVAILABLE": 1}
    broken, whole = report.per_stream
    # Frames 2 and 3 were sent and never answered; later ones had no stream.
    assert (broken.captured, broken.explained, broken.failed, broken.unsent) == (10, 2, {"UNAVAILABLE": 2}, 6)
    assert (whole.explained, whole.failed, whole.unsent) == (10, {}, 0)


async def test_a_bug_is_raised():
    clock = VirtualTime()

    def bug():
        raise KeyError("bug")

    with pytest.RaisesGroup(KeyError):
        await play(clock, [FakeStream(clock)], sources(10, 1.0), on_answer=bug)


def test_captures_are_those_before_the_end():
    # 0.3 * 10 is a little more than 3 in floating point.
    assert sources(10, 0.1 + 0.2).captures(0, 1) == 3
    assert sources(10, 0.31).captures(0, 1) == 4
    assert [sources(1, 0.5).captures(source, 4) for source in range(4)] == [1, 1, 0, 0]
    assert sources(1, 0.5).total(4) == 2
    assert sources(None, 0.5).total(4) is None


def test_sources_that_make_no_sense():
    with pytest.raises(ValueError, match="without a rate"):
        sources(None, 1.0, drop_oldest=True)
    with pytest.raises(ValueError, match="closed loop"):
        sources(None, 1.0).captures(0, 1)
