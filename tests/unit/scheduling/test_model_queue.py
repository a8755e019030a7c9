"""A caller's way through the queue: however it ends, the place in the queue is given back. The engine is a fake."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytest_asyncio

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import DeadlineExpired, InternalError, InvalidArgument, QueueFull, ServerDraining
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.entry import EntryState, QueueResult
from heatlens_server.scheduling.model_queue import ModelQueue

SPEC = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
POISON = 255
PATIENCE_S = 20


def image(value: int) -> FittedImage:
    pixels = np.full((2, 2, 3), value, np.uint8)
    return FittedImage(pixels=pixels, region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2)


@dataclass
class Engine:
    """Answers each image with its own value once the gate is open; fails on POISON."""

    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)
    seen: list[list[int]] = field(default_factory=list)
    closed: int = 0

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        values = [int(value) for value in images[:, 0, 0, 0]]
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.seen.append(values)
        if POISON in values:
            raise ValueError("secret")
        one = np.zeros(1, np.float32)
        return [ImageResult(np.array([v], np.float32), (0,), np.zeros((1, 1, 1), np.float32), one, one) for v in values]

    def ready(self, spec: MapSpec) -> bool:
        return True

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    made.gate.set()
    yield made
    made.gate.set()  # lets the threads of a failed test end


@pytest.fixture
def preparers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest_asyncio.fixture
async def queue(engine: Engine, preparers: ThreadPoolExecutor) -> AsyncIterator[ModelQueue]:
    made = ModelQueue(
        engine,
        name="test",
        preparers=preparers,
        max_batch_size=4,
        max_delay_s=0.0,
        max_queue_length=4,
        max_preparing=2,
    )
    yield made
    engine.gate.set()
    assert await made.close(timeout_s=PATIENCE_S)


def explain(
    queue: ModelQueue,
    value: int = 1,
    *,
    prepare: Callable[[], FittedImage] | None = None,
    timeout_s: float | None = None,
) -> "asyncio.Task[QueueResult]":
    make = prepare or (lambda: image(value))
    return asyncio.create_task(queue.explain(make, TopK(1), SPEC, timeout_s=timeout_s))


def value_of(explained: QueueResult) -> int:
    return int(explained.result.logits[0])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.001)


class Slow:
    """A preparation that takes until it is released."""

    def __init__(self, value: int = 1) -> None:
        self.started, self.release, self.finished = (threading.Event() for _ in range(3))
        self.value = value

    def __call__(self) -> FittedImage:
        self.started.set()
        assert self.release.wait(PATIENCE_S)
        self.finished.set()
        return image(self.value)


async def test_a_caller_gets_its_own_result_with_times_and_geometry(queue):
    explained = await explain(queue, 7)
    assert value_of(explained) == 7
    assert explained.image.source_width_px == 2
    assert explained.timing.preprocess_s >= 0
    assert explained.timing.batch_size == 1
    assert len(queue.batcher) == 0


async def test_a_batch_is_delivered_with_one_wake_up_of_the_loop(queue, monkeypatch):
    wake_ups = []
    loop = asyncio.get_running_loop()
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda call, *args: (wake_ups.append(len(args[0])), original(call, *args))[1]
    )
    queue.batcher.hold_until(4)
    answers = await asyncio.gather(*(explain(queue, value) for value in (3, 1, 4, 2)))
    assert [value_of(answer) for answer in answers] == [3, 1, 4, 2]
    assert [answer.timing.batch_size for answer in answers] == [4] * 4
    assert wake_ups == [4]


async def test_what_preparing_raises_reaches_the_caller_and_only_that_one(queue, engine):
    def fail() -> FittedImage:
        raise InvalidArgument.of("image.encoded", "corrupt", reason="IMAGE_UNDECODABLE")

    good, bad = explain(queue, 5), explain(queue, prepare=fail)
    with pytest.raises(InvalidArgument, match="corrupt"):
        await bad
    assert value_of(await good) == 5
    assert engine.seen == [[5]]
    assert len(queue.batcher) == 0


async def test_any_exception_of_preparing_is_raised_as_it_is(queue):
    def fail() -> FittedImage:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await explain(queue, prepare=fail)
    assert len(queue.batcher) == 0
    assert value_of(await explain(queue, 2)) == 2


async def test_engine_failure_is_an_internal_error_and_the_lane_lives(queue):
    with pytest.raises(InternalError):
        await explain(queue, POISON)
    assert value_of(await explain(queue, 2)) == 2


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_a_deadline_in_the_past_spares_decoder_and_model(queue, engine, timeout_s):
    prepared = []
    with pytest.raises(DeadlineExpired, match="before the image was decoded"):
        await explain(queue, prepare=lambda: prepared.append(1), timeout_s=timeout_s)
    assert prepared == []
    assert engine.seen == []
    assert len(queue.batcher) == 0


async def test_a_deadline_beyond_what_threads_can_wait_for_is_none(queue):
    queue.batcher.hold_until(2)
    first = explain(queue, 1, timeout_s=1e12)
    # Queued, so that whoever makes batches waits for its deadline or for another image.
    await until(lambda: len(queue.batcher._round) == 1)
    second = explain(queue, 2, timeout_s=1e12)
    assert [value_of(done) for done in await asyncio.wait_for(asyncio.gather(first, second), PATIENCE_S)] == [1, 2]


async def test_a_deadline_that_passes_while_others_are_decoded_spares_the_decoder(queue, preparers):
    blockers = [Slow(), Slow()]
    waiting = [explain(queue, prepare=blocker) for blocker in blockers]
    await until(lambda: all(blocker.started.is_set() for blocker in blockers))
    prepared = []
    late = explain(queue, prepare=lambda: prepared.append(1), timeout_s=0.01)
    await until(lambda: len(queue.batcher) == 3)
    admitted_at = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > admitted_at + 0.02)
    for blocker in blockers:
        blocker.release.set()
    with pytest.raises(DeadlineExpired):
        await late
    assert prepared == []
    await asyncio.gather(*waiting)


async def test_cancelled_while_preparing(queue, engine):
    slow = Slow()
    task = explain(queue, prepare=slow)
    await until(slow.started.is_set)
    assert len(queue.batcher) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(queue.batcher) == 0  # at once: the place is free while the decoder still works
    slow.release.set()
    await until(slow.finished.is_set)
    assert value_of(await explain(queue, 9)) == 9
    assert engine.seen == [[9]]


async def test_cancelled_before_a_preparer_is_free_is_not_decoded_at_all(queue):
    blockers = [Slow(2), Slow(3)]
    waiting = [explain(queue, prepare=blocker) for blocker in blockers]
    await until(lambda: all(blocker.started.is_set() for blocker in blockers))
    unwanted = Slow()
    task = explain(queue, prepare=unwanted)
    await until(lambda: len(queue.batcher) == 3)
    task.cancel()
    await asyncio.wait([task])
    for blocker in blockers:
        blocker.release.set()
    assert [value_of(await answer) for answer in waiting] == [2, 3]
    assert value_of(await explain(queue, 4)) == 4
    assert not unwanted.started.is_set()


async def test_cancelled_while_waiting_or_running(queue, engine):
    engine.gate.clear()
    running = explain(queue, 1)
    await until(engine.entered.is_set)
    # One batch is prepared ahead; hold this one back in the queue.
    queue.batcher.hold_until(9)
    queued = explain(queue, 2)
    await until(lambda: len(queue.batcher) == 1)
    running.cancel()
    queued.cancel()
    assert all(
        isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(running, queued, return_exceptions=True)
    )
    assert len(queue.batcher) == 0
    queue.batcher.hold_until(0)
    engine.gate.set()
    assert value_of(await explain(queue, 3)) == 3
    assert engine.seen == [[1], [3]]


async def test_a_full_queue_refuses_before_decoding_and_recovers(queue):
    queue.batcher.hold_until(9)
    waiting = [explain(queue, value) for value in range(4)]
    await until(lambda: len(queue.batcher) == 4)
    prepared = []
    with pytest.raises(QueueFull):
        await explain(queue, prepare=lambda: prepared.append(1))
    assert prepared == []
    queue.batcher.hold_until(0)
    assert [value_of(await answer) for answer in waiting] == [0, 1, 2, 3]
    assert value_of(await explain(queue, 5)) == 5


async def test_a_preparer_pool_that_is_shut_down_leaks_no_place(queue, preparers):
    preparers.shutdown()
    for _ in range(5):  # more than the queue's length
        with pytest.raises(RuntimeError, match="after shutdown"):
            await explain(queue)
    assert len(queue.batcher) == 0


async def test_closing_finishes_what_was_admitted_and_refuses_the_rest(queue, engine):
    engine.gate.clear()
    slow = Slow(2)
    admitted = [explain(queue, 1), explain(queue, prepare=slow)]
    await until(lambda: engine.entered.is_set() and slow.started.is_set())
    closing = asyncio.create_task(queue.close())
    await until(lambda: queue.batcher._closed)
    with pytest.raises(ServerDraining):
        await explain(queue, 3)
    assert not closing.done()
    slow.release.set()
    engine.gate.set()
    assert [value_of(await answer) for answer in admitted] == [1, 2]
    assert await closing
    assert engine.closed == 1


async def test_closing_a_stuck_engine_gives_up_in_time_and_leaves_it_open(queue, engine):
    engine.gate.clear()
    stuck = explain(queue, 1)
    await until(engine.entered.is_set)
    assert not await queue.close(timeout_s=0.01)
    assert engine.closed == 0  # its thread is inside
    engine.gate.set()
    assert value_of(await stuck) == 1
    assert await queue.close(timeout_s=PATIENCE_S)
    assert engine.closed == 1


async def test_an_outcome_after_the_caller_left_is_dropped(queue, engine, caplog):
    engine.gate.clear()
    task = explain(queue, POISON)
    await until(engine.entered.is_set)
    task.cancel()
    await asyncio.wait([task])
    engine.gate.set()
    assert value_of(await explain(queue, 1)) == 1
    assert "exception was never retrieved" not in caplog.text


async def test_states_end_where_they_should(queue):
    entries = []
    admit = queue.batcher.admit
    queue.batcher.admit = lambda *args, **kwargs: (entries.append(admit(*args, **kwargs)), entries[-1])[1]
    await explain(queue, 1)
    with pytest.raises(DeadlineExpired):
        await explain(queue, 1, timeout_s=0.0)
    assert [entry.state for entry in entries] == [EntryState.CLAIMED, EntryState.GONE]
