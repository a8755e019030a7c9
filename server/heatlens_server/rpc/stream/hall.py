"""All open streams: how many there may be, and what they are told when the server shuts down."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Protocol

from heatlens_server.errors import StreamLimit
from heatlens_server.rpc.gate import draining
from heatlens_server.rpc.stream.ledger import Ledger

_RETRY_S = 1.0


class Guest(Protocol):
    """A stream, as the hall sees it."""

    def drain(self) -> None:
        """Read no more, answer what is left, end."""


class StreamHall:
    """The open streams of a server. Belongs to the event loop.

    Attributes:
        ledger: what streams hold.
    """

    def __init__(self, *, max_streams: int) -> None:
        """An empty hall.

        Args:
            max_streams: most streams open at a time.
        """
        self.ledger = Ledger()
        self._max_streams = max_streams
        self._guests: set[Guest] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._draining = False

    @contextmanager
    def admit(self, guest: Guest) -> Iterator[None]:
        """Let a stream in, until the end of the block.

        Raises:
            StreamLimit: there are too many.
            ServerDraining: the server is shutting down.
        """
        if self._draining:
            raise draining()
        if len(self._guests) >= self._max_streams:
            raise StreamLimit(
                f"{self._max_streams} streams are open already",
                metadata={"max_streams": str(self._max_streams)},
                retry_after_s=_RETRY_S,
            )
        self._guests.add(guest)
        self.ledger.streams.created += 1
        try:
            yield
        finally:
            self._guests.discard(guest)
            self.ledger.streams.released += 1

    def start_reader(self, reader: Coroutine[object, object, None]) -> None:
        """Run what reads a stream's requests until it ends by itself, which may be a moment after its stream.

        It must never be cancelled: gRPC frees what a cancelled read was to be written to, and then writes to it.
        """
        self.ledger.readers.created += 1
        task = asyncio.create_task(reader)
        self._readers.add(task)
        task.add_done_callback(self._reader_ended)

    def drain(self) -> None:
        """Tell every stream to end, and let no other in. Idempotent."""
        self._draining = True
        for guest in tuple(self._guests):
            guest.drain()

    def _reader_ended(self, task: "asyncio.Task[None]") -> None:
        self._readers.discard(task)
        self.ledger.readers.released += 1
