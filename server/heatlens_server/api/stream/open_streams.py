"""All open streams: how many there may be, what they hold, and how they are ended."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from heatlens_server.core.errors import ServerDraining, StreamLimit
from heatlens_server.core.peers import gives_way, host_of
from heatlens_server.fleet.served_model import ServedModel

_RETRY_S = 1.0

_MAX_UNSENT = 4096


@dataclass(slots=True)
class Counter:
    """How many of a kind were made, and how many are gone again."""

    created: int = 0
    released: int = 0

    @property
    def open(self) -> int:
        """How many there are now."""
        return self.created - self.released


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Counts over all streams of a server since its start: whatever ends a stream, created and released become equal.

    Attributes:
        streams: admitted streams.
        readers: tasks that read requests.
        frames: frames that were read, until they are answered.
        tickets: frames that were sent to a model, until they are answered or taken back.
    """

    streams: Counter = field(default_factory=Counter)
    readers: Counter = field(default_factory=Counter)
    frames: Counter = field(default_factory=Counter)
    tickets: Counter = field(default_factory=Counter)

    @property
    def open(self) -> int:
        """How many things of any kind are still held."""
        return self.streams.open + self.readers.open + self.frames.open + self.tickets.open


class OpenStream(Protocol):
    """A stream, as `OpenStreams` sees it."""

    @property
    def model(self) -> ServedModel | None:
        """What explains its frames; None until that is known."""

    @property
    def ends_when_replaced(self) -> bool:
        """Whether it asked to end when its model is replaced."""

    def end(self, error: Exception) -> None:
        """Read no more, answer the frames that run, and end with `error`."""


class OpenStreams:
    """The open streams of a server. Belongs to the event loop.

    Attributes:
        counters: what streams hold.
        max_unsent: how many answers that need no model may wait to be sent, beyond a stream's window, where frames are
            dropped. They wait behind the frames that run, as answers come in order, and a camera at n times the
            server's speed sends n batches while one runs. If reading stopped there, frames would grow old in the
            network's buffers.
    """

    def __init__(
        self, *, max_streams: int, max_unsent: int = _MAX_UNSENT, host_of: Callable[[str], str] = host_of
    ) -> None:
        """No stream is open.

        Args:
            max_streams: most streams open at a time, those aside that are told to end.
            max_unsent: see the attribute.
            host_of: of a connection, the host that places are shared between.
        """
        self.counters = StreamCounters()
        self.max_unsent = max_unsent
        self._max_streams = max_streams
        self._host_of = host_of
        self._open: dict[OpenStream, str] = {}
        self._ending: set[OpenStream] = set()
        self._readers: set[asyncio.Task[None]] = set()
        self._draining = False

    @contextmanager
    def admit(self, stream: OpenStream, peer: str = "") -> Iterator[None]:
        """Let a stream in, until the end of the block. Where there are too many, another may end for it.

        Args:
            stream: what is let in.
            peer: the connection that it came by.

        Raises:
            StreamLimit: there are too many.
            ServerDraining: the server is shutting down.
        """
        if self._draining:
            raise ServerDraining
        if len(self._open) - len(self._ending) >= self._max_streams:
            full = StreamLimit(
                f"{self._max_streams} streams are open already",
                metadata={"max_streams": str(self._max_streams)},
                retry_after_s=_RETRY_S,
            )
            held = [(peer, one) for one, peer in self._open.items() if one not in self._ending]
            other = gives_way(held, peer, self._host_of)
            # Those that do not read their last answers end late.
            if other is None or len(self._ending) >= self._max_streams:
                raise full
            self._ending.add(other)
            other.end(full)
        self._open[stream] = peer
        self.counters.streams.created += 1
        try:
            yield
        finally:
            del self._open[stream]
            self._ending.discard(stream)
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

    def end_streams_of(self, model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
        """End the streams of a model that serves no longer. Those that are opened by its name later get another.

        Args:
            model: whose.
            error: what they end with.
            only_if_asked: end only those that asked to end when their model is replaced.
        """
        for stream in tuple(self._open):
            if stream.model is model and (stream.ends_when_replaced or not only_if_asked):
                stream.end(error)

    def _reader_ended(self, task: "asyncio.Task[None]") -> None:
        self._readers.discard(task)
        self.counters.readers.released += 1
