"""A caller of an explanation in steps who leaves half-way, and a stream that looks for a frame to drop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.errors import DeadlineExpired, FrameDropped, ServerDraining
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.model_queue import ModelQueue
from heatlens_server.scheduling.ticket import Ticket

SPEC = MapSpec(Method.SCORE_CAM, ("layer",), upsample=False)
PATIENCE_S = 20
IMAGE = FittedImage(
    pixels=np.zeros((2, 2, 3), np.uint8), region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2
)


class Engine:
    """Takes a million steps, unless the end is near."""

    def __init__(self) -> None:
        self.taken = self.live = 0
        self.near_end = threading.Event()

    def steps(self, image: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        self.live += 1
        try:
            while not self.near_end.is_set():
                self.taken += 1
                yield
        finally:
            self.live -= 1
        one = np.zeros(1, np.float32)
        return ImageResult(one, (0,), np.zeros((1, 1, 1), np.float32), one, one)

    def ready(self, spec: MapSpec) -> bool:
        return True

    def close(self) -> None:
        pass


@pytest_asyncio.fixture
async def queue() -> AsyncIterator[ModelQueue]:
    engine = Engine()
    with ThreadPoolExecutor(1) as preparers:
        made = ModelQueue(engine, name="m", preparers=preparers, max_batch_size=4, max_delay_s=0.0, max_queue_length=4)
        yield made
        engine.near_end.set()
        assert await made.close(timeout_s=PATIENCE_S)
    assert engine.live == 0
    assert len(made.batcher) == 0


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.001)


def submit(queue: ModelQueue, timeout_s: float | None = None) -> Ticket:
    return queue.submit(lambda: IMAGE, TopK(1), SPEC, timeout_s=timeout_s)


async def test_cancelling_the_wait_half_way_frees_the_device(queue):
    ticket = submit(queue)
    waiting = asyncio.create_task(ticket.result())
    await asyncio.sleep(0)  # it waits
    await until(lambda: queue._engine.taken > 5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: queue._engine.live == 0)
    taken = queue._engine.taken
    queue._engine.near_end.set()
    await submit(queue).result()
    assert queue._engine.taken == taken


async def test_giving_up_half_way(queue):
    ticket = submit(queue)
    await until(lambda: queue._engine.taken > 5)
    assert not ticket.waiting  # a stream drops frames that nothing was done for yet
    assert ticket.give_up(FrameDropped("too old"))
    assert not ticket.give_up(FrameDropped("again"))
    with pytest.raises(FrameDropped, match="too old"):
        await ticket.result()
    await until(lambda: queue._engine.live == 0)


async def test_too_late_to_give_up_what_is_done(queue):
    queue._engine.near_end.set()
    ticket = submit(queue)
    await ticket.result()
    assert not ticket.give_up(FrameDropped("too old"))


async def test_a_deadline_half_way(queue):
    ticket = submit(queue, timeout_s=0.05)
    with pytest.raises(DeadlineExpired, match="last step"):
        await asyncio.wait_for(ticket.result(), PATIENCE_S)
    assert queue._engine.taken
    await until(lambda: queue._engine.live == 0)


async def test_what_is_half_done_when_the_lane_closes_is_finished(queue):
    ticket = submit(queue)
    await until(lambda: queue._engine.taken > 5)
    closing = asyncio.create_task(queue.close())
    await until(lambda: queue.batcher._closed)
    queue._engine.near_end.set()
    assert (await asyncio.wait_for(ticket.result(), PATIENCE_S)).timing.batch_size == 1
    assert await closing


async def test_all_that_is_not_done_can_be_given_up(queue):
    """One in its steps, one that waits to begin, and one whose image is being decoded."""
    decoding = threading.Event()

    def decode() -> FittedImage:
        assert decoding.wait(PATIENCE_S)
        return IMAGE

    stepping, waiting = submit(queue), submit(queue)
    await until(lambda: queue._engine.taken > 5)
    preparing = queue.submit(decode, TopK(1), SPEC, timeout_s=None)
    queue.give_up(ServerDraining("over"))
    for ticket in (stepping, waiting, preparing):
        with pytest.raises(ServerDraining, match="over"):
            await asyncio.wait_for(ticket.result(), PATIENCE_S)
    with pytest.raises(ServerDraining):
        submit(queue)
    # The engine would never have ended, and an image is still being decoded.
    assert await queue.close(timeout_s=PATIENCE_S)
    assert queue._engine.live == 0
    decoding.set()
