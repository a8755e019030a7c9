"""What is in flight of requests and answers, for single calls and streams alike: bytes per connection and in all.

Requests and answers have a half of the budget each, so that a request which is let in can always be answered. Belongs
to the event loop.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from heatlens_server.api.byte_budget import SLOW_S, ByteBudget, Held
from heatlens_server.core.errors import PeerTooSlow
from heatlens_server.core.peers import host_of

T = TypeVar("T")

_RETRY_S = 1.0

_UNLIMITED_BYTES = 2**62

_PUBLIC_SLOW_S = 0.1
"""How long such a message may take while others wait: it is some bytes, which come with the headers."""

_PUBLIC_MESSAGES = 2
"""How many messages of callers that showed no token may be awaited at a time: those of health checks are tiny."""

_PUBLIC_WAITING = 64
"""How many more may wait for that: the newest of them."""

_REFLECTION_MESSAGES = 8
"""How many messages of reflection may be awaited at a time: tools keep their stream open between two questions."""

MAX_NAME_BYTES = 4096
"""Largest message of health checks and reflection, which hold a name: streams keep theirs."""


class Admission:
    """The budgets of a server, its messages that are being read, and its answers that are on their way.

    Attributes:
        requests: bytes of messages that are being read, or were read and are not answered yet.
        answers: bytes of answers that are being made, or were made and are not taken yet.
        configurations: bytes of masks and reference images that open streams keep.
        public: bytes of messages of those who need no token, while these are read.
        reflection: bytes of messages of reflection, while these are read.
        max_message_bytes: largest message: what one takes while its size is not known.
    """

    def __init__(
        self,
        *,
        max_bytes: int = _UNLIMITED_BYTES,
        max_peer_bytes: int = _UNLIMITED_BYTES,
        max_message_bytes: int = 1 << 24,
        receive_timeout_s: float = 60.0,
        send_timeout_s: float = 60.0,
        hang_up: Callable[[str], bool] = lambda _peer: False,
        host_of: Callable[[str], str] = host_of,
    ) -> None:
        """Nothing is in flight.

        Args:
            max_bytes: most in all, requests and answers together.
            max_peer_bytes: most of one connection.
            max_message_bytes: see the attribute.
            receive_timeout_s: how long a message may take to come, in seconds.
            send_timeout_s: how long an answer may take to be taken, in seconds.
            hang_up: closes a peer's connection; False if it cannot.
            host_of: of a connection, the host that room is shared between.
        """
        half, peer_half = max_bytes // 2, max_peer_bytes // 2
        self.requests = ByteBudget("requests", total_bytes=half, peer_bytes=peer_half, host_of=host_of)
        self.answers = ByteBudget(
            "answers",
            total_bytes=half,
            peer_bytes=peer_half,
            host_of=host_of,
            relieve=lambda: self._end_slowest(SLOW_S),
        )
        self.configurations = ByteBudget(
            "masks and reference images of streams",
            total_bytes=half // 2,
            peer_bytes=peer_half // 2,
            host_of=host_of,
        )
        public_bytes = _PUBLIC_MESSAGES * max_message_bytes
        self.public = ByteBudget(
            "health checks",
            total_bytes=public_bytes,
            peer_bytes=public_bytes,
            most_waiting=_PUBLIC_WAITING,
            slow_s=_PUBLIC_SLOW_S,
            host_of=host_of,
        )
        reflection_bytes = _REFLECTION_MESSAGES * max_message_bytes
        self.reflection = ByteBudget(
            "reflection",
            total_bytes=reflection_bytes,
            peer_bytes=reflection_bytes,
            most_waiting=_PUBLIC_WAITING,
            host_of=host_of,
        )
        self.max_message_bytes = max_message_bytes
        self._receive_timeout_s = receive_timeout_s
        self._send_timeout_s = send_timeout_s
        self._hang_up = hang_up
        # The one that takes longest comes first.
        self._sending: dict[object, tuple[str, float]] = {}
        self._reads: set[asyncio.Task[Any]] = set()

    async def receive(self, held: Held, read: Coroutine[Any, Any, T]) -> T:
        """Wait for a message that there is room for: see `ByteBudget.await_message`.

        The reading itself is never cancelled (see `OpenStreams.start_reader`): it ends when its call does.

        Raises:
            PeerTooSlow: the message takes too long to come.
        """
        reading = asyncio.create_task(read)
        self._reads.add(reading)
        reading.add_done_callback(self._end_read)
        waits: list[asyncio.Future[Any]] = [reading] if held.cut is None else [reading, held.cut]
        await asyncio.wait(waits, timeout=self._receive_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise PeerTooSlow("the message took too long to come", retry_after_s=_RETRY_S)
        return reading.result()

    @contextmanager
    def sending(self, peer: str) -> Iterator[None]:
        """While an answer is on its way. A peer that does not take it is hung up on.

        That is so after `send_timeout_s`, or after a second while others wait for room and this one waits longest.
        """
        loop = asyncio.get_running_loop()
        key = object()
        self._sending[key] = (peer, loop.time())
        timer = loop.call_later(self._send_timeout_s, self._end_slowest, self._send_timeout_s)
        try:
            yield
        finally:
            timer.cancel()
            del self._sending[key]

    def _end_slowest(self, limit_s: float) -> None:
        now = asyncio.get_running_loop().time()
        for peer, since in self._sending.values():
            if now - since < 0.99 * limit_s or self._hang_up(peer):
                return

    def _end_read(self, reading: "asyncio.Task[Any]") -> None:
        self._reads.discard(reading)
        if not reading.cancelled():
            # Of a call that has ended: nobody asks.
            reading.exception()
