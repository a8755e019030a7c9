"""A stream whose requests have nothing in common: each is answered as a call of its own would be, in their order.

As in `session`, one task reads, and is never cancelled; the call itself writes. One answer is built at a time.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from heatlens_server.api.byte_budget import Held
from heatlens_server.api.calls import current_call, is_fault
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.models import known_name
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.core.events import Trace
from heatlens_server.fleet.served_model import ServedModel

_log = logging.getLogger("heatlens.rpc")

Q = TypeVar("Q")
A = TypeVar("A")

Turn = Callable[[], Awaitable[object]]
"""Returns once the answer may be built: those before it are sent."""


class RequestPeer(Protocol[Q, A]):
    """The client's end of a stream, as its transport gives it."""

    async def read(self) -> Q | None:
        """The next request; None at the end. What it raises ends the stream once the requests before are answered."""
        ...

    def about(self, request: Q) -> tuple[str, int]:
        """The name of the model that a request asks, and how many bytes it takes."""
        ...

    async def answer(self, request: Q, turn: Turn, trace: Trace) -> A:
        """Answer a request; may raise."""
        ...

    async def send(self, request: Q, outcome: A | Exception) -> None:
        """Send an answer, or what went wrong. Waits while the client does not read."""
        ...


@dataclass(slots=True, eq=False)
class _Pending(Generic[Q, A]):
    """A request between its reading and its answer."""

    request: Q
    model: str
    held: Held
    trace: Trace = field(default_factory=Trace)
    read_at: float = field(default_factory=time.monotonic)
    turn: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[A | Exception] | None" = None


class RequestStream(Generic[Q, A]):
    """One stream. `run` is the call. Implements `OpenStream`.

    Attributes:
        model: None: each request names its own.
        ends_when_replaced: False: each request gets the model that serves by then.
    """

    model: ServedModel | None = None
    ends_when_replaced = False

    def __init__(self, explainer: Explainer, open_streams: OpenStreams, peer: RequestPeer[Q, A]) -> None:
        """Make a stream that reads nothing yet.

        Args:
            explainer: whose limits and observer are told.
            open_streams: runs the reader, and counts.
            peer: the client's end.
        """
        self._explainer = explainer
        self._open_streams = open_streams
        self._peer = peer
        self._call = current_call()
        self._requests = explainer.admission.requests
        self._pending: deque[_Pending[Q, A]] = deque()
        self._counts: Counter[str] = Counter()
        self._read_count = 0
        self._over = False
        self._end_error: Exception | None = None
        self._news = asyncio.Event()
        self._room = asyncio.Event()

    async def run(self) -> None:
        """Answer every request in order, until the client half-closes.

        Raises:
            InvalidArgument: a message is no request.
            ServerDraining: the server shuts down.
        """
        self._open_streams.start_reader(self._read())
        try:
            while self._pending or not self._over:
                if self._pending:
                    await self._answer(self._pending[0])
                else:
                    await self._news.wait()
                    self._news.clear()
            if self._end_error is not None:
                raise self._end_error
        finally:
            self.end(None)
            while self._pending:
                self._pop()
            self._call.fields.update({f"frames_{kind}": self._counts[kind] for kind in ("explained", "failed")})

    def end(self, error: Exception | None) -> None:
        """Read no more, answer the requests that were read, and end with `error`. Only the first call counts."""
        if not self._over:
            self._over, self._end_error = True, error
        self._news.set()
        self._room.set()

    async def _answer(self, first: _Pending[Q, A]) -> None:
        first.turn.set()
        if first.task is None:
            raise AssertionError("nothing was begun")
        outcome = await first.task
        kind = "failed" if isinstance(outcome, Exception) else "explained"
        if isinstance(outcome, Exception) and is_fault(outcome):
            _log.error("request of a stream", exc_info=outcome, extra={"request_id": self._call.request_id})
        await self._peer.send(first.request, outcome)
        self._counts[kind] += 1
        self._explainer.observer.frame_answered(
            model=first.model, outcome=kind, age_s=time.monotonic() - first.read_at, trace=first.trace
        )
        self._pop()

    def _pop(self) -> None:
        first = self._pending.popleft()
        if first.task is not None:
            first.task.cancel()
        first.held.release()
        self._open_streams.counters.frames.released += 1
        self._room.set()

    async def _read(self) -> None:
        error: Exception | None = None
        try:
            while await self._has_room():
                request = await self._peer.read()
                if request is None or self._over:
                    break
                self._begin(request)
        except Exception as raised:
            error = raised
        self.end(error)

    async def _has_room(self) -> bool:
        """Wait until a request may be read; False once there will be none."""
        most = self._explainer.limits.max_in_flight
        while not self._over and (len(self._pending) >= most or self._requests.is_full(self._call.peer)):
            with self._requests.watched(self._room.set):
                await self._room.wait()
                self._room.clear()
        return not self._over

    def _begin(self, request: Q) -> None:
        name, size_bytes = self._peer.about(request)
        held = self._requests.hold(self._call.peer)
        held.keep(size_bytes)
        one: _Pending[Q, A] = _Pending(request, known_name(self._explainer.fleet, name), held)
        self._explainer.observer.frame_began(
            model=one.model, frame_id=self._read_count, call=self._call.trace, trace=one.trace
        )
        self._read_count += 1
        self._open_streams.counters.frames.created += 1
        one.task = asyncio.create_task(self._outcome(one))
        self._pending.append(one)
        self._news.set()

    async def _outcome(self, one: _Pending[Q, A]) -> A | Exception:
        try:
            return await self._peer.answer(one.request, one.turn.wait, one.trace)
        except Exception as error:
            return error
