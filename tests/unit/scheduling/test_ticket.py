"""A ticket: awaited, given up, cancelled or forgotten. The engine is a fake; nothing sleeps for a set time."""

import asyncio
import contextlib
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from heatlens_server.core.errors import FrameDropped, InternalError, InvalidArgument, QueueFull, ServerDraining
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.entry import Source
from heatlens_server.scheduling.model_queue import ModelQueue
from heatlens_server.scheduling.ticket import Ticket
from queue_engines import BATCHED, PATIENCE_S, POISON, BatchEngine, image, until


class Rig:
    """A queue whose engine and decoder wait for their gates."""

    def __init__(self, decoders: ThreadPoolExecutor) -> None:
        self.engine = BatchEngine()
        self.engine.gate.clear()
        self.may_decode = threading.Event()
        self.decoders = decoders
        self.decoded: list[int] = []
        self.queue = ModelQueue(
            [self.engine],
            name="test",
            decoders=decoders,
            max_batch_size=4,
            max_delay_s=0.0,
            max_queue_length=4,
            max_decoding=1,
        )

    def open(self) -> None:
        self.engine.gate.set()
        self.may_decode.set()

    def decoder(self, value: int) -> Callable[[], FittedImage]:
        def decode() -> FittedImage:
            assert self.may_decode.wait(PATIENCE_S)
            self.decoded.append(value)
            return image(value)

        return decode

    def submit(self, value: int, *, source: Source | None = None) -> Ticket:
        return self.queue.submit(self.decoder(value), TopK(1), BATCHED, timeout_s=None, source=source)

    async def running(self, value: int) -> Ticket:
        """A ticket whose image is in the engine."""
        self.may_decode.set()
        ticket = self.submit(value)
        await asyncio.to_thread(self.engine.entered.wait, PATIENCE_S)
        return ticket


@pytest_asyncio.fixture
async def rig() -> AsyncIterator[Rig]:
    complaints = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
    with ThreadPoolExecutor(2) as decoders:
        made = Rig(decoders)
        yield made
        made.open()
        assert await made.queue.close(timeout_s=PATIENCE_S)
    assert len(made.queue.batcher) == 0
    await asyncio.sleep(0)  # outcomes of the last batch
    gc.collect()
    assert complaints == []


async def value_of(ticket: Ticket) -> int:
    async with asyncio.timeout(PATIENCE_S):
        return int((await ticket.result()).result.logits[0])


async def test_submit_returns_before_anything_has_run(rig):
    ticket = rig.submit(7)
    assert ticket.waiting
    rig.open()
    assert await value_of(ticket) == 7
    assert not ticket.waiting
    assert await value_of(ticket) == 7  # as often as one likes


async def test_given_up_while_being_decoded(rig):
    ticket = rig.submit(1)
    assert ticket.give_up(FrameDropped("too old"))
    assert len(rig.queue.batcher) == 0
    assert not ticket.waiting
    rig.open()
    with pytest.raises(FrameDropped, match="too old"):
        await ticket.result()
    assert not ticket.give_up(FrameDropped("again"))
    assert await value_of(rig.submit(2)) == 2
    assert rig.engine.seen == [[2]]


async def test_given_up_before_a_decoder_is_free_is_never_decoded(rig):
    first, second = rig.submit(1), rig.submit(2)
    assert second.give_up(FrameDropped("too old"))
    rig.open()
    assert await value_of(first) == 1
    assert await value_of(rig.submit(3)) == 3
    assert rig.decoded == [1, 3]


async def test_given_up_in_the_queue(rig):
    await rig.running(8)
    ahead = rig.submit(9)
    await until(lambda: not ahead.waiting)
    ticket = rig.submit(1)
    await until(lambda: rig.queue.batcher.waiting == 1)
    assert ticket.give_up(FrameDropped("too old"))
    others = [rig.submit(2), rig.submit(3)]
    rig.open()
    assert [await value_of(other) for other in others] == [2, 3]
    with pytest.raises(FrameDropped):
        await ticket.result()
    assert [value for batch in rig.engine.seen for value in batch] == [8, 9, 2, 3]


async def test_too_late_to_give_up_what_runs(rig):
    ticket = await rig.running(5)
    assert not ticket.waiting
    assert not ticket.give_up(FrameDropped("too old"))
    rig.open()
    assert await value_of(ticket) == 5


async def test_giving_up_wakes_the_caller_that_waits(rig):
    ticket = rig.submit(1)
    waiting = asyncio.create_task(ticket.result())
    await asyncio.sleep(0)
    assert ticket.give_up(ServerDraining("going"))
    with pytest.raises(ServerDraining, match="going"):
        async with asyncio.timeout(PATIENCE_S):
            await waiting


async def test_cancelling_the_wait_takes_the_image_back(rig):
    ticket = rig.submit(1)
    waiting = asyncio.create_task(ticket.result())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert len(rig.queue.batcher) == 0
    assert not ticket.waiting
    assert not ticket.give_up(FrameDropped("late"))


async def test_a_ticket_need_not_be_awaited(rig):
    """The fixture asserts that the event loop had nothing to complain about."""

    def fail() -> FittedImage:
        raise InvalidArgument.of("image.encoded", "corrupt", reason="IMAGE_UNDECODABLE")

    rig.submit(1).give_up(FrameDropped("too old"))
    rig.open()
    rig.queue.submit(fail, TopK(1), BATCHED, timeout_s=None)
    rig.queue.submit(lambda: image(2), TopK(1), BATCHED, timeout_s=0.0)
    rig.submit(POISON)
    assert await value_of(rig.submit(3)) == 3


async def test_errors_reach_callers_that_ask_late(rig):
    rig.open()
    ticket = rig.submit(POISON)
    await until(lambda: not ticket.waiting)
    with pytest.raises(InternalError):
        await ticket.result()
    with pytest.raises(InternalError):
        await ticket.result()


async def test_streams_leave_callers_their_places(rig):
    stream = Source()
    frames = [rig.submit(value, source=stream) for value in range(20)]
    callers = [rig.submit(100 + value) for value in range(4)]
    with pytest.raises(QueueFull):
        rig.submit(200)
    frames.append(rig.submit(20, source=stream))
    rig.open()
    assert [await value_of(ticket) for ticket in frames] == list(range(21))
    assert [await value_of(ticket) for ticket in callers] == [100, 101, 102, 103]


async def test_what_a_ticket_held_is_free_once_it_is_given_up(rig):
    """No cycle through the error's traceback, and no decoder's queue, keeps a dropped frame alive."""
    blocked = rig.submit(1)  # the second one waits for a decoder
    decode, error = rig.decoder(2), FrameDropped("too old")
    held = [weakref.ref(decode), weakref.ref(error)]
    ticket = rig.queue.submit(decode, TopK(1), BATCHED, timeout_s=None)
    gc.disable()
    try:
        assert ticket.give_up(error)
        with contextlib.suppress(FrameDropped):
            await ticket.result()
        del ticket, decode, error
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
    assert blocked.give_up(FrameDropped("the end"))


async def test_a_closed_queue_admits_nothing(rig):
    rig.queue.batcher.close()
    for source in (None, Source()):
        with pytest.raises(ServerDraining):
            rig.submit(1, source=source)
