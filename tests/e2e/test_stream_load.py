"""Streams under load: senders faster than the server, and the ages of answers.

The server is a process of its own. Its model "slow" takes BATCH_S for a batch, whatever the machine does, so that
"twice the server's speed" is a number; others are real networks at their own speed.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator

import numpy as np
import pytest

from heatlens import AsyncClient, Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import distinct
from observed_server import Holdings, ObservedServer, forget_peak, observed_server, rss_bytes
from raw_stream import RawStream, kinds, own_channel
from server_toml import model_toml, server_toml

pytestmark = pytest.mark.serial

BATCH_S = 0.2
BATCH_SIZE, WIDE_BATCH_SIZE = 4, 32
SERVER_FPS = BATCH_SIZE / BATCH_S
TOML = server_toml(
    model_toml("slow", max_batch_size=BATCH_SIZE),
    model_toml("slow-wide", "slow", max_batch_size=WIDE_BATCH_SIZE),
    model_toml("mlp", "tiny_mlp", max_batch_size=16),
    log_level="warning",
    default_model="slow",
)
REAL_TOML = server_toml(
    '[[models]]\nname = "real"\nsource = "embedded:efficientnet_lite0"\nengine = "torch"',
    "batching = { max_batch_size = 2 }",
    log_level="warning",
)

MIB = 2**20
DROP_OLDEST = pb.OVERFLOW_POLICY_DROP_OLDEST


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObservedServer]:
    """A server whose model "slow" takes BATCH_S per batch."""
    folder = tmp_path_factory.mktemp("paced")
    with observed_server(folder, TOML, env={"SLOW_S": str(BATCH_S)}) as server:
        (folder / "armed").touch()
        yield server
        assert server.stop() == 0


@pytest.fixture
def loaded(paced: ObservedServer) -> Iterator[ObservedServer]:
    """The same; what a test's streams took, they have given back afterwards."""
    yield paced
    paced.until(lambda held: held.balanced)


@contextlib.asynccontextmanager
async def raw(server: ObservedServer) -> AsyncIterator[explain_pb2_grpc.ExplainServiceStub]:
    async with own_channel(server.address) as channel:
        yield explain_pb2_grpc.ExplainServiceStub(channel)


@contextlib.asynccontextmanager
async def watching(server: ObservedServer, see: Callable[[Holdings], None]) -> AsyncIterator[None]:
    """Look at what the server holds, again and again, as long as the block runs."""
    over = asyncio.Event()

    async def watch() -> None:
        while not over.is_set():
            see(await asyncio.to_thread(server.holdings))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), 0.05)

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        over.set()
        await watcher


# Senders that never wait, and nothing may be lost.

FLOOD, FLOOD_WINDOW = 64, 8
# 1.7 MiB each: all of them would be 108 MiB. The window's are 14 MiB, and gRPC's own buffers about twice that.
FLOOD_IMAGES = distinct(8, px=768)
FLOOD_BOUND_BYTES = 80 * MIB


class Pulled:
    """An endless supply that counts what was taken from it."""

    def __init__(self) -> None:
        self.count = 0

    def frames(self) -> Iterator[np.ndarray]:
        for i in range(FLOOD):
            self.count += 1
            yield FLOOD_IMAGES[i % len(FLOOD_IMAGES)]


async def flood_raw(server: ObservedServer) -> list[int]:
    async with raw(server) as stub:
        stream = RawStream(stub)
        await stream.open(max_in_flight=FLOOD_WINDOW)
        sending = asyncio.create_task(send_all(stream, Pulled().frames()))
        answers = await stream.answers(FLOOD)
        await sending
        assert await stream.finish() == []
    assert {kind for _, kind in kinds(answers)} == {"result"}
    return [answer.frame_id for answer in answers]


async def send_all(stream: RawStream, images: Iterator[np.ndarray]) -> None:
    for i, image in enumerate(images):
        await stream.send(i, image)


async def flood_sync(server: ObservedServer) -> list[int]:
    def run() -> list[int]:
        pulled, ids = Pulled(), []
        with Client(server.address) as client, client.stream(max_in_flight=FLOOD_WINDOW) as stream:
            for item in stream.map(pulled.frames()):
                assert pulled.count - len(ids) <= FLOOD_WINDOW, "the iterable is never pulled further ahead"
                assert item.error is None
                ids.append(item.frame_id)
        return ids

    return await asyncio.to_thread(run)


async def flood_async(server: ObservedServer) -> list[int]:
    pulled, ids = Pulled(), []
    async with AsyncClient(server.address) as client, client.stream(max_in_flight=FLOOD_WINDOW) as stream:
        async for item in stream.map(pulled.frames()):
            assert pulled.count - len(ids) <= FLOOD_WINDOW, "the iterable is never pulled further ahead"
            assert item.error is None
            ids.append(item.frame_id)
    return ids


@pytest.mark.parametrize("flood", [flood_raw, flood_sync, flood_async])
async def test_a_sender_that_never_waits_loses_nothing_and_the_server_stays_small(loaded, flood):
    """The raw one offers far more than ten times what the server explains; the SDK holds the iterable back."""
    most_open = 0

    def see(held: Holdings) -> None:
        nonlocal most_open
        most_open = max(most_open, held.open("frames"))

    before = loaded.holdings()
    forget_peak(loaded.pid)
    rss_before = rss_bytes(loaded.pid)
    started = time.monotonic()
    async with watching(loaded, see):
        ids = await flood(loaded)
    took_s = time.monotonic() - started
    assert ids == list(range(FLOOD))
    assert 1 < most_open <= FLOOD_WINDOW
    assert loaded.holdings().created["frames"] - before.created["frames"] == FLOOD
    grown_bytes = rss_bytes(loaded.pid, peak=True) - rss_before
    print(f"the server grew by {grown_bytes / MIB:.1f} MiB at most, {took_s:.1f} s")
    assert grown_bytes < FLOOD_BOUND_BYTES
    # The device was what it waited for: it ran full batches, one after the other.
    assert took_s < 1.5 * FLOOD / SERVER_FPS


# Cameras, which wait for nobody.


class Camera:
    """`frames` and `frames_async` deliver each image when it is due; a late consumer gets the late ones at once.

    The time of capture is when a frame was due: a consumer that does not take it in time makes it older, not younger.
    """

    def __init__(self, images: list[np.ndarray], *, fps: float, count: int) -> None:
        """Show `images` over and over, `count` frames in all."""
        self._images, self._fps, self._count = images, fps, count
        self._start_s = 0.0

    def frames(self) -> Iterator[np.ndarray]:
        """For threads."""
        self._start_s = time.monotonic()
        for i in range(self._count):
            time.sleep(max(0.0, self.captured_s(i) - time.monotonic()))
            yield self._images[i % len(self._images)]

    async def frames_async(self) -> AsyncIterator[np.ndarray]:
        """For event loops."""
        self._start_s = time.monotonic()
        for i in range(self._count):
            await asyncio.sleep(max(0.0, self.captured_s(i) - time.monotonic()))
            yield self._images[i % len(self._images)]

    def captured_s(self, i: int) -> float:
        """When frame `i` was captured, on the monotonic clock."""
        return self._start_s + i / self._fps

    def age_s(self, i: int) -> float:
        """How old frame `i` is now."""
        return time.monotonic() - self.captured_s(i)


class Ages:
    """What became of a camera's frames."""

    def __init__(self, camera: Camera, count: int) -> None:
        self.camera, self.count = camera, count
        self.outcomes: list[tuple[int, str]] = []
        self.explained: dict[int, float] = {}
        self.batch_s: list[float] = []

    def note(self, frame_id: int, outcome: str, compute_s: float | None = None) -> None:
        self.outcomes.append((frame_id, outcome))
        if compute_s is not None:
            self.explained[frame_id] = self.camera.age_s(frame_id)
            self.batch_s.append(compute_s)

    def check(self) -> None:
        """In order, none twice, none missing, the newest explained, all explained ones fresh, early and late."""
        # A busy machine makes some batches slower than others, and it is the slow ones whose answers are old.
        batch_s = float(np.percentile(self.batch_s, 99))
        assert [frame_id for frame_id, _ in self.outcomes] == list(range(self.count))
        assert {outcome for _, outcome in self.outcomes} == {"result", "dropped"}
        assert self.count - 1 in self.explained
        ages = np.asarray(list(self.explained.values())) / batch_s
        early, late = (float(np.median(half)) for half in np.array_split(ages, 2))
        p90, p99 = (float(np.percentile(ages, share)) for share in (90, 99))
        print(
            f"{len(ages)}/{self.count} explained, batch {batch_s * 1e3:.1f} ms; ages in batches: p90 {p90:.2f}, "
            f"p99 {p99:.2f}, largest {ages.max():.2f}, median early {early:.2f}, late {late:.2f}"
        )
        # The camera does not wait for a machine that pauses for a moment, and a pause makes one batch's frames old.
        assert p90 <= 3
        assert p99 <= 5
        assert late < early + 0.5


async def film_raw(server: ObservedServer, camera: Camera, ages: Ages, *, model: str, window: int | None) -> None:
    async with raw(server) as stub:
        stream = RawStream(stub)
        await stream.open(model=model, overflow_policy=DROP_OLDEST, max_in_flight=window or 0)

        async def send() -> None:
            i = 0
            async for image in camera.frames_async():
                await stream.send(i, image)
                i += 1
            await stream.call.done_writing()

        sending = asyncio.create_task(send())
        for _ in range(ages.count):
            answer = await stream.answer()
            ((frame_id, kind),) = kinds([answer])
            if kind == "result":
                timing = answer.result.timing
                ages.note(frame_id, kind, timing.compute_duration.ToMicroseconds() / 1e6)
            else:
                assert kind == "RESOURCE_EXHAUSTED"
                ages.note(frame_id, "dropped")
        await sending
        assert await stream.finish() == []


async def film_sync(server: ObservedServer, camera: Camera, ages: Ages, *, model: str, window: int | None) -> None:
    def run() -> None:
        with (
            Client(server.address) as client,
            client.stream(model=model, overflow="drop-oldest", max_in_flight=window) as stream,
        ):
            for item in stream.map(camera.frames()):
                note_item(ages, item)

    await asyncio.to_thread(run)


async def film_async(server: ObservedServer, camera: Camera, ages: Ages, *, model: str, window: int | None) -> None:
    async with (
        AsyncClient(server.address) as client,
        client.stream(model=model, overflow="drop-oldest", max_in_flight=window) as stream,
    ):
        async for item in stream.map(camera.frames_async()):
            note_item(ages, item)


def note_item(ages: Ages, item) -> None:
    if item.result is None:
        assert item.dropped, item
        ages.note(item.frame_id, "dropped")
    else:
        ages.note(item.frame_id, "result", item.result.timing.compute_ms / 1e3)


@pytest.mark.parametrize(
    ("film", "model", "times", "window"),
    [
        # Batches so large that hundreds of frames come and are dropped while one runs.
        (film_raw, "slow-wide", 2, None),
        (film_raw, "slow", 10, None),
        (film_sync, "slow", 2, 1),
        (film_sync, "slow-wide", 2, None),
        (film_async, "slow", 2, None),
    ],
)
async def test_a_camera_faster_than_the_server_gets_answers_that_stay_fresh(loaded, film, model, times, window):
    batch_size = WIDE_BATCH_SIZE if model == "slow-wide" else BATCH_SIZE
    count = round(times * batch_size / BATCH_S * 4)
    camera = Camera(distinct(8), fps=times * batch_size / BATCH_S, count=count)
    ages = Ages(camera, count)
    await film(loaded, camera, ages, model=model, window=window)
    assert BATCH_S <= np.median(ages.batch_s) < 1.3 * BATCH_S
    ages.check()
    # Fresh, but not idle: dropping all but one frame of each batch would be fresh as well. A window of 1 is that.
    assert len(ages.explained) > (0.8 if window != 1 else 0.8 / batch_size) * count / times


async def test_a_camera_at_twice_the_speed_of_a_real_network(tmp_path):
    image = distinct(8, px=224)
    with observed_server(tmp_path, REAL_TOML) as server:
        with Client(server.address) as client, client.stream() as stream:
            warm = [item.result.timing.compute_ms / 1e3 for item in stream.map(image * 2)]
            started = time.monotonic()
            warm += [item.result.timing.compute_ms / 1e3 for item in stream.map(image * 3)]
            fps = len(image) * 3 / (time.monotonic() - started)
        count = round(2 * fps * 4)
        camera = Camera(image, fps=2 * fps, count=count)
        ages = Ages(camera, count)
        await film_raw(server, camera, ages, model="", window=None)
        ages.check()
        server.until(lambda held: held.balanced)
        assert server.stop() == 0


async def test_a_flood_for_a_fast_network_is_answered_in_order_and_ends_with_the_newest(loaded):
    """As fast as a client can send: the server spends its time on dropping, and holds on to nothing."""
    count = 3000
    images = distinct(8, px=128)  # 141 MiB in all
    forget_peak(loaded.pid)
    rss_before = rss_bytes(loaded.pid)
    async with raw(loaded) as stub:
        stream = RawStream(stub)
        await stream.open(model="mlp", overflow_policy=DROP_OLDEST, max_in_flight=16)
        sending = asyncio.create_task(send_all(stream, (images[i % 8] for i in range(count))))
        outcomes = kinds(await stream.answers(count))
        await sending
        assert await stream.finish() == []
    assert [frame_id for frame_id, _ in outcomes] == list(range(count))
    assert {kind for _, kind in outcomes} <= {"result", "RESOURCE_EXHAUSTED"}
    assert outcomes[-1][1] == "result"
    grown_bytes = rss_bytes(loaded.pid, peak=True) - rss_before
    print(f"the server grew by {grown_bytes / MIB:.1f} MiB at most")
    assert grown_bytes < 70 * MIB
