"""All open streams: how many there may be, and what they are told when the server shuts down."""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Protocol

from heatlens_server.api.stream.stream_counters import StreamCounters
from heatlens_server.core.errors import ServerDraining, StreamLimit
from heatlens_server.fleet.served_model import ServedModel

_RETRY_S = 1.0


class OpenStream(Protocol):
    """A stream, as the open_streams sees it."""

    @property
    def model(self) -> ServedModel | None:
        """What explains its frames; None until that is known."""

    def end(self, error: Exception) -> None:
        """Read no more, answer the frames that run, and end with `error`."""


class OpenStreams:
    """The open streams of a server. Belongs to the event loop.

    Attributes:
        counters: what streams hold.
    """

    def __init__(self, *, max_streams: int) -> None:
        """An empty open_streams.

        Args:
            max_streams: most streams open at a time.
        """
        self.counters = StreamCounters()
        self._max_streams = max_streams
        self._open: set[OpenStream] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._draining = False

    @contextmanager
    def admit(self, stream: OpenStream) -> Iterator[None]:
        """Let a stream in, until the end of the block.

        Raises:
            StreamLimit: there are too many.
            ServerDraining: the server is shutting down.
        """
        if self._draining:
            raise ServerDraining
        if len(self._open) >= self._max_streams:
            raise StreamLimit(
                f"{self._max_streams} streams are open already",
                metadata={"max_streams": str(self._max_streams)},
                retry_after_s=_RETRY_S,
            )
        self._open.add(stream)
        self.counters.streams.created += 1
        try:
            yield
        finally:
            self._open.discard(stream)
            self.counters.streams.released += 1

    def start_reader(self, reader: Coroutine[object, object, None]) -> None:
        """Run what reads a stream's requests until it ends by itself, which may be a moment after its stream.

        It must never be cancelled: gRPC frees what a cancelled read was to be written to, and then writes to it.
        """
        self.counters.readers.created += 1
        task = asyncio.create_task(reader)
        self._readers.add(task)
        task.add_done_callback(self._reader_ended)

    def drain(self) -> None:
        """Tell every stream to end, and let no other in. Idempotent."""
        self._draining = True
        for stream in tuple(self._open):
            stream.end(ServerDraining())

    def end_streams_of(self, model: ServedModel, error: Exception) -> None:
        """End the streams of a model that serves no longer. Those that are opened by its name later get another."""
        for stream in tuple(self._open):
            if stream.model is model:
                stream.end(error)

    def _reader_ended(self, task: "asyncio.Task[None]") -> None:
        self._readers.discard(task)
        self.counters.readers.released += 1
