"""A caller of an explanation in steps who leaves half-way, and a stream that looks for a frame to drop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from heatlens_server.core.errors import DeadlineExpired, FrameDropped, ServerDraining
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.model_queue import ModelQueue
from heatlens_server.scheduling.ticket import Ticket
from queue_engines import PATIENCE_S, STEPPED, StepEngine, image, until


@pytest.fixture
def engine() -> Iterator[StepEngine]:
    """Takes steps without end, unless its `count` is set to 0."""
    made = StepEngine(count=1_000_000_000)
    made.run_all()
    yield made
    made.count = 0


@pytest_asyncio.fixture
async def queue(engine: StepEngine) -> AsyncIterator[ModelQueue]:
    with ThreadPoolExecutor(1) as decoders:
        made = ModelQueue([engine], name="m", decoders=decoders, max_batch_size=4, max_delay_s=0.0, max_queue_length=4)
        yield made
        engine.count = 0
        assert await made.close(timeout_s=PATIENCE_S)
    assert engine.live == 0
    assert len(made.batcher) == 0


def submit(queue: ModelQueue, timeout_s: float | None = None) -> Ticket:
    return queue.submit(lambda: image(1), TopK(1), STEPPED, timeout_s=timeout_s)


async def test_cancelling_the_wait_half_way_frees_the_device(queue, engine):
    ticket = submit(queue)
    waiting = asyncio.create_task(ticket.result())
    await asyncio.sleep(0)  # it waits
    await until(lambda: engine.taken > 5)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await until(lambda: engine.live == 0)
    taken = engine.taken
    engine.count = 0
    await submit(queue).result()
    assert engine.taken == taken + 1


async def test_giving_up_half_way(queue, engine):
    ticket = submit(queue)
    await until(lambda: engine.taken > 5)
    assert not ticket.waiting  # a stream drops frames that nothing was done for yet
    assert ticket.give_up(FrameDropped("too old"))
    assert not ticket.give_up(FrameDropped("again"))
    with pytest.raises(FrameDropped, match="too old"):
        await ticket.result()
    await until(lambda: engine.live == 0)


async def test_too_late_to_give_up_what_is_done(queue, engine):
    engine.count = 0
    ticket = submit(queue)
    await ticket.result()
    assert not ticket.give_up(FrameDropped("too old"))


async def test_a_deadline_half_way(queue, engine):
    ticket = submit(queue, timeout_s=0.05)
    with pytest.raises(DeadlineExpired, match="last step"):
        await asyncio.wait_for(ticket.result(), PATIENCE_S)
    assert engine.taken
    await until(lambda: engine.live == 0)


async def test_what_is_half_done_when_the_queue_closes_is_finished(queue, engine):
    ticket = submit(queue)
    await until(lambda: engine.taken > 5)
    closing = asyncio.create_task(queue.close())
    await until(lambda: queue.batcher.closed)
    engine.count = 0
    assert (await asyncio.wait_for(ticket.result(), PATIENCE_S)).timing.batch_size == 1
    assert await closing


async def test_all_that_is_not_done_can_be_given_up(queue, engine):
    """One in its steps, one that waits to begin, and one whose image is being decoded."""
    decoding = threading.Event()

    def decode() -> FittedImage:
        assert decoding.wait(PATIENCE_S)
        return image(1)

    stepping, waiting = submit(queue), submit(queue)
    await until(lambda: engine.taken > 5)
    being_decoded = queue.submit(decode, TopK(1), STEPPED, timeout_s=None)
    queue.give_up(ServerDraining("over"))
    for ticket in (stepping, waiting, being_decoded):
        with pytest.raises(ServerDraining, match="over"):
            await asyncio.wait_for(ticket.result(), PATIENCE_S)
    with pytest.raises(ServerDraining):
        submit(queue)
    # The engine would never have ended, and an image is still being decoded.
    assert await queue.close(timeout_s=PATIENCE_S)
    assert engine.live == 0
    decoding.set()
