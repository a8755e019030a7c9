"""A stream of requests that have nothing in common, without a transport: what it reads and writes is the test's."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from fleets import PATIENCE_S, fleet_of, until
from heatlens_server.api.checks import Limits
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.stream.independent import RequestStream
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.core.errors import ServerDraining
from heatlens_server.core.events import Observer, Trace

WINDOW = 3
SIZE_BYTES = 100


class Client:
    """The client's end. An answer is found once the test releases it, and is built in its turn."""

    def __init__(self) -> None:
        self._sent: asyncio.Queue[int | Exception | None] = asyncio.Queue()
        self.reads = 0
        self.found: dict[int, asyncio.Event] = {}
        self.built: list[int] = []
        self.cancelled: list[int] = []
        self.received: list[str] = []

    def push(self, *requests: int | Exception | None) -> None:
        for request in requests:
            self._sent.put_nowait(request)

    async def read(self) -> int | None:
        self.reads += 1
        sent = await self._sent.get()
        if isinstance(sent, Exception):
            raise sent
        return sent

    def about(self, request: int) -> tuple[str, int]:
        return "m", SIZE_BYTES

    async def answer(self, request: int, turn: Callable, trace: Trace) -> str:
        self.found[request] = asyncio.Event()
        try:
            await self.found[request].wait()
            await turn()
        except asyncio.CancelledError:
            self.cancelled.append(request)
            raise
        self.built.append(request)
        if request < 0:
            raise ValueError(request)
        return str(request)

    async def send(self, request: int, outcome: str | Exception) -> None:
        self.received.append(repr(outcome) if isinstance(outcome, Exception) else outcome)

    async def release(self, *requests: int) -> None:
        for request in requests:
            await until(lambda: request in self.found)  # noqa: B023 - waited for at once
            self.found[request].set()


class Frames(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def frame_began(self, *, model: str, frame_id: int, call: Trace, trace: Trace) -> None:
        self.seen.append(("began", frame_id))

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: Trace | None) -> None:
        self.seen.append((outcome, age_s >= 0))


class Running:
    """A stream that runs."""

    def __init__(self, explainer: Explainer) -> None:
        self.client, self.open = Client(), OpenStreams(max_streams=1)
        self.requests = explainer.admission.requests
        self.stream = RequestStream(explainer, self.open, self.client)
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        with self.open.admit(self.stream):
            await self.stream.run()

    async def result(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.task


@pytest_asyncio.fixture
async def running() -> AsyncIterator[Running]:
    """Whatever a test does, the stream gives back what it took."""
    limits = Limits(1 << 20, 100, max_queue_length=1, max_targets=1, max_streams=1, max_in_flight=WINDOW)
    made = Running(Explainer(await fleet_of(), limits, Frames()))
    yield made
    made.task.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):
        await made.result()
    made.client.push(None)  # the reader is never cancelled
    await until(lambda: made.open.counters.open == 0)
    assert made.requests.held_bytes == 0


async def test_answers_are_built_one_at_a_time_in_the_order_of_requests(running):
    client = running.client
    client.push(1, 2, 3, None)
    await client.release(3, 2)
    assert (client.built, client.received) == ([], [])
    await client.release(1)
    await running.result()
    assert client.built == [1, 2, 3]
    assert client.received == ["1", "2", "3"]


async def test_an_error_is_an_answer_in_its_place(running):
    client = running.client
    client.push(1, -2, 3, None)
    await client.release(1, -2, 3)
    await running.result()
    assert client.received == ["1", "ValueError(-2)", "3"]
    seen = running.stream._explainer.observer.seen
    assert [one for one in seen if one[0] == "began"] == [("began", i) for i in range(3)]
    assert [one for one in seen if one[0] != "began"] == [("explained", True), ("failed", True), ("explained", True)]


async def test_no_more_is_read_than_the_window_holds(running):
    client = running.client
    client.push(*range(10), None)
    await until(lambda: client.reads == WINDOW)
    await client.release(2, 1)
    assert (client.reads, running.requests.held_bytes) == (WINDOW, WINDOW * SIZE_BYTES)
    await client.release(0)
    await client.release(*range(3, 10))
    await running.result()
    assert client.received == [str(i) for i in range(10)]


async def test_a_drain_answers_what_was_read_and_reads_no_more(running):
    client = running.client
    client.push(1, 2)
    await until(lambda: client.reads == 3)
    running.open.drain()
    client.push(3)
    await client.release(1, 2)
    with pytest.raises(ServerDraining):
        await running.result()
    assert client.received == ["1", "2"]
    assert set(client.found) == {1, 2}


async def test_what_is_no_request_ends_the_stream_after_those_before(running):
    client = running.client
    client.push(1, LookupError("no request"))
    await client.release(1)
    with pytest.raises(LookupError):
        await running.result()
    assert client.received == ["1"]


async def test_what_a_client_that_is_gone_had_asked_for_is_given_up(running):
    client = running.client
    client.push(1, 2)
    await until(lambda: len(client.found) == 2)
    running.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running.result()
    await until(lambda: set(client.cancelled) == {1, 2})
    assert client.received == []
