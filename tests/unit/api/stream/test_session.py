"""One stream without gRPC: what it reads and writes is in the test's hands. The queue is real, its engine a fake."""

import asyncio
import dataclasses
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from fleets import fleet_of
from heatlens_server.api.answer import Answer
from heatlens_server.api.checks import Limits
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.query import Frame, Image, OverflowPolicy, StreamConfig, StreamMessage, Tensor
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.api.stream.session import StreamSession
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import InvalidArgument, ModelUnloaded, ServerDraining, StreamLimit
from heatlens_server.core.events import Observer
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage, Interpolation, PreprocessSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import Source
from heatlens_server.scheduling.model_queue import ModelQueue
from in_process_server import until
from raw_stream import PATIENCE_S

INFO = Capabilities("torch", "cpu", "fp32", 2, 2, 1, (Method.GRAD_CAM,), ("layer",))
LIMITS = Limits(
    max_message_bytes=1 << 20, max_image_pixels=100, max_queue_length=1, max_targets=1, max_streams=2, max_in_flight=64
)


class Engine:
    """Answers each image with its own value, once the gate is open or it has a pass."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.passes = threading.Semaphore(0)
        self.entered = 0
        self.info = INFO

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        self.entered += 1
        while not (self.gate.wait(0.001) or self.passes.acquire(blocking=False)):
            pass
        one = np.zeros(1, np.float32)
        values = [np.array([image[0, 0, 0]], np.float32) for image in images]
        return [ImageResult(value, (0,), np.zeros((1, 1, 1), np.float32), one, one) for value in values]

    def is_loaded_for(self, spec: MapSpec) -> bool:
        return True

    def close(self) -> None:
        pass


class Client:
    """The client's end of a stream, in the test's hands."""

    def __init__(self) -> None:
        self._sent: asyncio.Queue[StreamMessage | Exception | None] = asyncio.Queue()
        self.reads = 0
        self.reads_cancelled = 0
        self.started: dict[str, object] = {}
        self.received: list[tuple[int, Answer | Exception | None]] = []
        self.reading = asyncio.Event()
        self.reading.set()
        self.write_error: Exception | None = None

    def configure(self, **config) -> None:
        self._sent.put_nowait(StreamConfig(**config))

    def push(self, frame_id: int) -> None:
        pixels = Tensor("UINT8", (2, 2, 3), bytes([frame_id % 256] * 12))
        self._sent.put_nowait(Frame(frame_id, Image(pixels=pixels)))

    def finish(self, error: Exception | None = None) -> None:
        self._sent.put_nowait(error)

    def all_read(self) -> bool:
        return self._sent.empty()

    async def read(self) -> StreamMessage | None:
        self.reads += 1
        try:
            sent = await self._sent.get()
        except asyncio.CancelledError:
            self.reads_cancelled += 1
            raise
        if isinstance(sent, Exception):
            raise sent
        return sent

    def encode(self, answer: Answer) -> Answer:
        return answer

    async def start(self, **started) -> None:
        await self._write()
        self.started = started

    async def send(self, frame_id: int, outcome: Answer | Exception | None) -> None:
        await self._write()
        self.received.append((frame_id, outcome))

    async def _write(self) -> None:
        await self.reading.wait()
        if self.write_error is not None:
            raise self.write_error

    def answers(self) -> list[tuple[int, str]]:
        """Frame ids, with what was answered: "Answer" or the error's name."""
        assert self.started
        return [(frame_id, type(outcome).__name__) for frame_id, outcome in self.received]


class Frames(Observer):
    """Collects what is told of frames."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: object) -> None:
        assert 0.0 <= age_s < PATIENCE_S
        self.seen.append((model, outcome))


class Rig:
    def __init__(self, engine: Engine, queue: ModelQueue, fleet: Fleet) -> None:
        self.engine, self.queue, self.open_streams = engine, queue, OpenStreams(max_streams=2, max_unsent=64)
        self.fleet = fleet
        self.frames = Frames()
        self.explainer = Explainer(fleet, LIMITS, self.frames)

    def start(self, client: Client) -> "asyncio.Task[None]":
        session = StreamSession(self.explainer, self.open_streams, client)

        async def call() -> None:
            with self.open_streams.admit(session):
                await session.run()

        return asyncio.create_task(call())

    async def add_own(self) -> None:
        """Have a batch that is none of the test's go to the closed gate, or wait ahead of those that come."""
        image = FittedImage(np.zeros((2, 2, 3), np.uint8), PixelBox(0, 0, 2, 2), 2, 2)
        spec = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
        ticket = self.queue.submit(lambda: image, TopK(1), spec, timeout_s=None, source=Source())
        await until(lambda: self.engine.entered and not ticket.waiting)

    async def balanced(self) -> None:
        await until(lambda: self.open_streams.counters.open == 0 and len(self.queue.batcher) == 0)


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    engine = Engine()
    with ThreadPoolExecutor(2) as decoders:
        queue = ModelQueue([engine], name="m", decoders=decoders, max_batch_size=4, max_delay_s=0.0, max_queue_length=1)
        preprocess = PreprocessSpec(2, (2, 2), (0.5,) * 3, (0.5,) * 3, Interpolation.BILINEAR)
        model = ServedModel("m", "1", (), preprocess, INFO, Method.GRAD_CAM, 4, 0.0, queue)
        yield Rig(engine, queue, await fleet_of(model))
        engine.gate.set()
        assert await queue.close(timeout_s=PATIENCE_S)


async def ended(call: "asyncio.Task[None]") -> None:
    async with asyncio.timeout(PATIENCE_S):
        await call


async def test_frames_are_answered_in_order_with_their_own_results(rig):
    client = Client()
    client.configure(max_in_flight=5)
    for i in range(1, 60):
        client.push(i)
    client.finish()
    await ended(rig.start(client))
    assert client.answers() == [(i, "Answer") for i in range(1, 60)]
    assert [answer.explanations[0].class_score.logit for _, answer in client.received] == list(range(1, 60))
    await rig.balanced()
    counters = rig.open_streams.counters
    counts = (counters.streams, counters.readers, counters.frames, counters.tickets)
    assert [balance.created for balance in counts] == [1, 1, 59, 59]


@pytest.mark.parametrize("policy", OverflowPolicy)
async def test_a_client_that_never_reads_is_not_read_for_ever(rig, policy):
    client = Client()
    client.configure(max_in_flight=3, overflow_policy=policy)
    client.reading.clear()
    for i in range(300):
        client.push(i)
    call = rig.start(client)
    bound = 3 if policy is OverflowPolicy.BLOCK else 3 + 64
    other = Client()
    other.configure()
    for i in range(1, 20):
        other.push(i)
    other.finish()
    await ended(rig.start(other))
    assert other.answers() == [(i, "Answer") for i in range(1, 20)]
    frames = rig.open_streams.counters.frames
    assert frames.open <= bound
    # Told to drain, it still cannot send; only the end of the grace, a cancel, ends it.
    rig.open_streams.drain()
    assert client.received == []
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    client.finish()  # as gRPC does when the call is over
    await rig.balanced()
    assert client.reads_cancelled == 0


async def test_a_read_that_is_under_way_is_left_alone_and_is_the_last(rig):
    client = Client()
    client.configure()
    call = rig.start(client)
    await until(lambda: client.reads == 2)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert (rig.open_streams.counters.streams.open, rig.open_streams.counters.readers.open) == (0, 1)
    client.push(1)
    await rig.balanced()
    assert (client.reads, client.reads_cancelled) == (2, 0)
    assert (rig.open_streams.counters.frames.created, rig.engine.entered) == (0, 0)


async def test_an_answer_that_cannot_be_written_ends_the_stream_and_is_raised(rig):
    client = Client()
    client.configure()
    client.write_error = BrokenPipeError("gone")
    call = rig.start(client)
    for i in range(5):
        client.push(i)
    with pytest.raises(BrokenPipeError):
        await ended(call)
    client.finish()
    await rig.balanced()


async def test_what_reading_raises_is_raised_after_the_answers(rig):
    client = Client()
    client.configure()
    client.push(1)
    client.finish(KeyError("a bug"))
    with pytest.raises(KeyError, match="a bug"):
        await ended(rig.start(client))
    assert client.answers() == [(1, "Answer")]
    await rig.balanced()


async def test_drain_before_the_configuration(rig):
    client = Client()
    call = rig.start(client)
    await until(lambda: client.reads == 1)
    rig.open_streams.drain()
    with pytest.raises(ServerDraining):
        await ended(call)
    client.configure()  # comes too late
    await rig.balanced()
    assert client.received == []
    with pytest.raises(ServerDraining):
        await ended(rig.start(Client()))


async def frame_in_hand(rig: Rig, client: Client) -> "asyncio.Task[None]":
    """A stream whose frames 1 and 2 run, and which has read frame 3 and has no place for it."""
    client.configure(max_in_flight=1, overflow_policy=OverflowPolicy.DROP_OLDEST)
    rig.engine.gate.clear()
    await rig.add_own()
    call = rig.start(client)
    client.push(1)
    # The batch ahead claims it.
    await until(lambda: client.reads == 3 and len(rig.queue.batcher) == 0)
    client.push(2)
    # Frame 2 waits, so that the next frame is being read.
    await until(lambda: client.reads == 4 and len(rig.queue.batcher) == 1)
    # Now frame 1 is in the engine, and frame 2 ahead.
    rig.engine.passes.release()
    await until(lambda: len(rig.queue.batcher) == 0)
    client.push(3)
    await until(client.all_read)
    return call


async def test_drain_answers_what_runs_and_not_the_frame_in_hand(rig):
    client = Client()
    call = await frame_in_hand(rig, client)
    rig.open_streams.drain()
    rig.engine.gate.set()
    with pytest.raises(ServerDraining):
        await ended(call)
    assert client.answers() == [(1, "Answer"), (2, "Answer")]
    assert client.reads == 4
    await rig.balanced()


async def test_drain_while_the_head_waits_answers_nothing(rig):
    client = Client()
    client.configure(max_in_flight=2)
    rig.engine.gate.clear()
    for _ in range(2):
        await rig.add_own()
    call = rig.start(client)
    client.push(1)
    client.push(2)
    await until(lambda: len(rig.queue.batcher) == 2)
    rig.open_streams.drain()
    with pytest.raises(ServerDraining):
        await ended(call)
    assert client.answers() == []
    await rig.balanced()


async def test_the_streams_of_a_model_that_serves_no_longer_answer_what_runs_and_end(rig):
    client = Client()
    call = await frame_in_hand(rig, client)
    unopened = Client()
    other = rig.start(unopened)
    await until(lambda: unopened.reads == 1)
    model = rig.fleet.get("m")
    rig.open_streams.end_streams_of(dataclasses.replace(model, generation=2), ModelUnloaded("m", "was unloaded"))
    rig.open_streams.end_streams_of(model, ModelUnloaded("m", "was replaced"))
    rig.engine.gate.set()
    with pytest.raises(ModelUnloaded, match="'m' was replaced"):
        await ended(call)
    assert client.answers() == [(1, "Answer"), (2, "Answer")]
    # One that has not said its model goes on.
    unopened.configure()
    unopened.push(1)
    unopened.finish()
    await ended(other)
    assert unopened.answers() == [(1, "Answer")]
    await rig.balanced()


async def test_cancel_with_a_frame_in_hand_forgets_it(rig):
    client = Client()
    call = await frame_in_hand(rig, client)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await rig.balanced()
    assert (client.reads, rig.open_streams.counters.frames.created) == (4, 2)


async def test_a_frame_in_hand_gets_its_place_once_another_is_answered(rig):
    client = Client()
    call = await frame_in_hand(rig, client)
    rig.engine.gate.set()
    client.finish()
    await ended(call)
    assert client.answers() == [(1, "Answer"), (2, "Answer"), (3, "Answer")]
    await rig.balanced()


async def test_a_violation_is_raised_after_the_window_is_answered(rig):
    client = Client()
    client.configure()
    for i in (1, 2, 2, 3):
        client.push(i)
    with pytest.raises(InvalidArgument, match="must increase"):
        await ended(rig.start(client))
    assert client.answers() == [(1, "Answer"), (2, "Answer")]
    await rig.balanced()


async def test_a_queue_that_takes_nothing_fails_frames_not_the_stream(rig, caplog):
    client = Client()
    client.configure()
    call = rig.start(client)
    await until(lambda: client.started)
    rig.queue.batcher.close()
    client.push(1)
    client.finish()
    await ended(call)
    assert client.answers() == [(1, "ServerDraining")]
    await rig.balanced()


async def test_places_are_counted_from_the_first_moment(rig):
    clients = [Client() for _ in range(3)]
    calls = [rig.start(client) for client in clients]
    with pytest.raises(StreamLimit):
        await ended(calls[2])
    for client, call in zip(clients[:2], calls[:2], strict=True):
        client.configure()
        client.finish()
        await ended(call)
    await rig.balanced()
    assert rig.open_streams.counters.streams.created == 2


async def test_dropped_frames_are_reported_and_their_errors_free_without_the_garbage_collector(rig):
    client = Client()
    client.configure(max_in_flight=1, overflow_policy=OverflowPolicy.DROP_OLDEST)
    rig.engine.gate.clear()
    for _ in range(2):
        await rig.add_own()
    call = rig.start(client)
    gc.disable()
    try:
        for i in range(5):
            client.push(i)
            await until(lambda count=i: rig.open_streams.counters.frames.created > count)
        await until(lambda: len(client.received) == 4)
        assert client.answers() == [(i, "FrameDropped") for i in range(4)]
        assert rig.frames.seen == [("m", "dropped")] * 4
        errors = [weakref.ref(outcome) for _, outcome in client.received]
        client.received.clear()
        await until(lambda: not any(error() for error in errors))
    finally:
        gc.enable()
    rig.engine.gate.set()
    client.finish()
    await ended(call)
    assert client.answers() == [(4, "Answer")]
    await rig.balanced()
