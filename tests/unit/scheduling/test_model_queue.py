"""A caller's way through the queue: however it ends, the place in the queue is given back. The engine is a fake."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import DeadlineExpired, InternalError, InvalidArgument, QueueFull, ServerDraining
from heatlens_server.core.events import Observer
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds, Target, TopK
from heatlens_server.scheduling.entry import EntryState, QueueResult, Source
from heatlens_server.scheduling.model_queue import ModelQueue
from queue_engines import BATCHED, PATIENCE_S, POISON, BatchEngine, image, until


class Recorder(Observer):
    """Notes what was admitted and decoded."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def admitted(self, *, model: str, in_stream: bool) -> None:
        self.events.append(f"{model}: admitted{' in a stream' if in_stream else ''}")

    def decoded(self, *, model: str, duration_s: float, trace: object) -> None:
        assert duration_s >= 0
        self.events.append(f"{model}: decoded")


@pytest.fixture
def engine() -> Iterator[BatchEngine]:
    made = BatchEngine()
    yield made
    made.gate.set()  # lets the threads of a failed test end


@pytest.fixture
def decoders() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest_asyncio.fixture
async def queue(engine: BatchEngine, decoders: ThreadPoolExecutor, recorder: Recorder) -> AsyncIterator[ModelQueue]:
    made = ModelQueue(
        [engine],
        name="test",
        decoders=decoders,
        max_batch_size=4,
        max_delay_s=0.0,
        max_queue_length=4,
        max_decoding=2,
        observer=recorder,
    )
    yield made
    engine.gate.set()
    assert await made.close(timeout_s=PATIENCE_S)


def explain(
    queue: ModelQueue,
    value: int = 1,
    *,
    decode: Callable[[], FittedImage] | None = None,
    timeout_s: float | None = None,
) -> "asyncio.Task[QueueResult]":
    async def call() -> QueueResult:
        return await queue.submit(decode or (lambda: image(value)), TopK(1), BATCHED, timeout_s=timeout_s).result()

    return asyncio.create_task(call())


def value_of(found: QueueResult) -> int:
    return int(found.result.logits[0])


async def busy(queue: ModelQueue, engine: BatchEngine) -> "list[asyncio.Task[QueueResult]]":
    """One batch in the engine, which waits for its gate, and one ahead: what comes now waits in the queue."""
    engine.gate.clear()
    tasks = []
    for value in (101, 102):
        ticket = queue.submit(lambda value=value: image(value), TopK(1), BATCHED, timeout_s=None)
        tasks.append(asyncio.create_task(ticket.result()))
        await until(lambda ticket=ticket: not ticket.waiting and engine.entered.is_set())
    return tasks


class Slow:
    """A decoder that takes until it is released."""

    def __init__(self, value: int = 1) -> None:
        self.started, self.release, self.finished = (threading.Event() for _ in range(3))
        self.value = value

    def __call__(self) -> FittedImage:
        self.started.set()
        assert self.release.wait(PATIENCE_S)
        self.finished.set()
        return image(self.value)


async def test_a_caller_gets_its_own_result_with_times_and_geometry(queue, recorder):
    found = await explain(queue, 7)
    assert value_of(found) == 7
    assert found.image.source_width_px == 2
    assert found.timing.preprocess_s >= 0
    assert found.timing.batch_size == 1
    assert len(queue.batcher) == 0
    assert recorder.events == ["test: admitted", "test: decoded"]


async def test_the_target_is_finished_once_the_image_is_decoded(queue, engine, recorder):
    targets: list[Target] = []
    run = engine.explain

    def note(images: np.ndarray, wanted: list[Target], spec: MapSpec) -> list[ImageResult]:
        targets.extend(wanted)
        return run(images, wanted, spec)

    engine.explain = note

    def finish(fitted: FittedImage) -> Target:
        return ClassIds((fitted.source_width_px,))

    await queue.submit(
        lambda: image(1), TopK(1), BATCHED, timeout_s=None, source=Source(), finish_target=finish
    ).result()
    assert targets == [ClassIds((2,))]
    assert recorder.events[0] == "test: admitted in a stream"


async def test_a_batch_is_delivered_with_one_wake_up_of_the_loop(queue, engine, monkeypatch):
    running = await busy(queue, engine)
    wake_ups = []
    loop = asyncio.get_running_loop()
    original = loop.call_soon_threadsafe
    monkeypatch.setattr(
        loop, "call_soon_threadsafe", lambda call, *args: (wake_ups.append(len(args[0])), original(call, *args))[1]
    )
    tasks = [explain(queue, value) for value in (3, 1, 4, 2)]
    await until(lambda: queue.batcher.waiting == 4)
    engine.gate.set()
    answers = await asyncio.gather(*tasks)
    assert [value_of(answer) for answer in answers] == [3, 1, 4, 2]
    assert [answer.timing.batch_size for answer in answers] == [4] * 4
    assert wake_ups == [1, 1, 4]
    await asyncio.gather(*running)


async def test_what_decoding_raises_reaches_the_caller_and_only_that_one(queue, engine):
    def fail() -> FittedImage:
        raise InvalidArgument.of("image.encoded", "corrupt", reason="IMAGE_UNDECODABLE")

    good, bad = explain(queue, 5), explain(queue, decode=fail)
    with pytest.raises(InvalidArgument, match="corrupt"):
        await bad
    assert value_of(await good) == 5
    assert engine.seen == [[5]]
    assert len(queue.batcher) == 0


async def test_any_exception_of_decoding_is_raised_as_it_is(queue):
    def fail() -> FittedImage:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        await explain(queue, decode=fail)
    assert len(queue.batcher) == 0
    assert value_of(await explain(queue, 2)) == 2


async def test_engine_failure_is_an_internal_error_and_the_queue_lives(queue):
    with pytest.raises(InternalError):
        await explain(queue, POISON)
    assert value_of(await explain(queue, 2)) == 2


@pytest.mark.parametrize("timeout_s", [0.0, -1.0])
async def test_a_deadline_in_the_past_spares_decoder_and_model(queue, engine, timeout_s):
    decoded = []
    with pytest.raises(DeadlineExpired, match="before the image was decoded"):
        await explain(queue, decode=lambda: decoded.append(1), timeout_s=timeout_s)
    assert decoded == []
    assert engine.seen == []
    assert len(queue.batcher) == 0


async def test_a_deadline_beyond_what_threads_can_wait_for_is_none(queue, engine):
    running = await busy(queue, engine)
    # It waits, so that the thread that makes batches waits for its deadline or for another image.
    first = explain(queue, 1, timeout_s=1e12)
    await until(lambda: queue.batcher.waiting == 1)
    second = explain(queue, 2, timeout_s=1e12)
    await until(lambda: queue.batcher.waiting == 2)
    engine.gate.set()
    assert [value_of(done) for done in await asyncio.wait_for(asyncio.gather(first, second), PATIENCE_S)] == [1, 2]
    await asyncio.gather(*running)


async def test_a_deadline_that_passes_while_others_are_decoded_spares_the_decoder(queue, decoders):
    blockers = [Slow(), Slow()]
    waiting = [explain(queue, decode=blocker) for blocker in blockers]
    await until(lambda: all(blocker.started.is_set() for blocker in blockers))
    decoded = []
    late = explain(queue, decode=lambda: decoded.append(1), timeout_s=0.01)
    await until(lambda: len(queue.batcher) == 3)
    admitted_at = asyncio.get_running_loop().time()
    await until(lambda: asyncio.get_running_loop().time() > admitted_at + 0.02)
    for blocker in blockers:
        blocker.release.set()
    with pytest.raises(DeadlineExpired):
        await late
    assert decoded == []
    await asyncio.gather(*waiting)


async def test_cancelled_while_decoding(queue, engine):
    slow = Slow()
    task = explain(queue, decode=slow)
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


async def test_cancelled_before_a_decoder_is_free_is_not_decoded_at_all(queue):
    blockers = [Slow(2), Slow(3)]
    waiting = [explain(queue, decode=blocker) for blocker in blockers]
    await until(lambda: all(blocker.started.is_set() for blocker in blockers))
    unwanted = Slow()
    task = explain(queue, decode=unwanted)
    await until(lambda: len(queue.batcher) == 3)
    task.cancel()
    await asyncio.wait([task])
    for blocker in blockers:
        blocker.release.set()
    assert [value_of(await answer) for answer in waiting] == [2, 3]
    assert value_of(await explain(queue, 4)) == 4
    assert not unwanted.started.is_set()


async def test_cancelled_while_waiting_or_running(queue, engine):
    tasks = [*await busy(queue, engine), explain(queue, 2)]
    await until(lambda: queue.batcher.waiting == 1)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert len(queue.batcher) == 0
    engine.gate.set()
    assert value_of(await explain(queue, 3)) == 3
    assert engine.seen == [[101], [102], [3]]


async def test_a_full_queue_refuses_before_decoding_and_recovers(queue, engine):
    running = await busy(queue, engine)
    waiting = [explain(queue, value) for value in range(4)]
    await until(lambda: queue.batcher.waiting == 4)
    decoded = []
    with pytest.raises(QueueFull):
        await explain(queue, decode=lambda: decoded.append(1))
    assert decoded == []
    engine.gate.set()
    assert [value_of(await answer) for answer in waiting] == [0, 1, 2, 3]
    assert value_of(await explain(queue, 5)) == 5
    await asyncio.gather(*running)


async def test_a_decoder_pool_that_is_shut_down_leaks_no_place(queue, decoders):
    decoders.shutdown()
    for _ in range(5):  # more than the queue's length
        with pytest.raises(RuntimeError, match="after shutdown"):
            await explain(queue)
    assert len(queue.batcher) == 0


async def test_closing_finishes_what_was_admitted_and_refuses_the_rest(queue, engine):
    engine.gate.clear()
    slow = Slow(2)
    admitted = [explain(queue, 1), explain(queue, decode=slow)]
    await until(lambda: engine.entered.is_set() and slow.started.is_set())
    closing = asyncio.create_task(queue.close())
    await until(lambda: queue.batcher.closed)
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


async def test_where_all_places_are_taken_the_newest_of_the_host_that_has_most_is_refused_for_others(queue, engine):
    running = await busy(queue, engine)

    def submit(host: int):
        spec = {"timeout_s": None, "peer": f"ipv4:10.0.0.{host}:1"}
        return queue.submit(lambda: image(host), TopK(1), BATCHED, **spec)

    first = [submit(1) for _ in range(4)]
    with pytest.raises(QueueFull):
        submit(1)
    for host in (2, 3):
        assert queue.refusal(f"ipv4:10.0.0.{host}:1") is None
    others = [submit(2), submit(3)]
    for ticket in first[2:]:
        with pytest.raises(QueueFull):
            await ticket.result()
    with pytest.raises(QueueFull):
        submit(2)
    assert queue.refusal("ipv4:10.0.0.2:1") is not None
    engine.gate.set()
    assert [value_of(await ticket.result()) for ticket in (*first[:2], *others)] == [1, 1, 2, 3]
    await asyncio.gather(*running)


async def test_states_end_where_they_should(queue):
    entries = []
    admit = queue.batcher.admit
    queue.batcher.admit = lambda *args, **kwargs: (entries.append(admit(*args, **kwargs)), entries[-1])[1]
    await explain(queue, 1)
    with pytest.raises(DeadlineExpired):
        await explain(queue, 1, timeout_s=0.0)
    assert [entry.state for entry in entries] == [EntryState.CLAIMED, EntryState.GONE]


async def test_all_devices_are_loaded_run_and_closed(decoders):
    class Loads(BatchEngine):
        def __init__(self) -> None:
            super().__init__()
            self.loaded = False

        def is_loaded_for(self, spec: MapSpec) -> bool:
            return self.loaded

        def load_for(self, spec: MapSpec) -> None:
            self.loaded = True

    engines = [Loads(), Loads()]
    queue = ModelQueue(engines, name="m", decoders=decoders, max_batch_size=1, max_delay_s=0.0, max_queue_length=4)
    for engine in engines:
        engine.gate.clear()
    await queue.load_for(dataclasses.replace(BATCHED, layers=("late",)))
    assert [engine.loaded for engine in engines] == [True, True]
    tasks = [explain(queue, value) for value in (1, 2)]
    await until(lambda: all(engine.entered.is_set() for engine in engines))
    for engine in engines:
        engine.gate.set()
    assert [value_of(await task) for task in tasks] == [1, 2]
    assert await queue.close(timeout_s=PATIENCE_S)
    assert [engine.closed for engine in engines] == [1, 1]
