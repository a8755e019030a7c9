"""Reaching into a server on the test's own loop: a model's queue and engine, and a device that stops when told."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Costs seconds: tests that use none of this need not wait.
    from heatlens_server.app import Server
    from heatlens_server.core.engine import Engine
    from heatlens_server.scheduling.batcher import Batcher

PATIENCE_S = 20.0


def batcher_of(server: "Server", model: str = "mlp") -> "Batcher":
    """The queue of a model."""
    return server.fleet.get(model).queue.batcher


def engine_of(server: "Server", model: str = "mlp") -> "Engine":
    """The engine of a model."""
    return server.fleet.get(model).queue._engine


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that happens in other threads."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def balanced(server: "Server") -> None:
    """Wait until the server's streams have given back all that they took."""
    await until(lambda: server.streams.counters.open == 0 and len(batcher_of(server)) == 0)


class DeviceGate:
    """Holds batches inside the engine of a model while it is closed. Open at first.

    Attributes:
        batches: those that came to the device; of each, its images by their first pixel.
    """

    def __init__(self, server: "Server", model: str = "mlp") -> None:
        self.batches: list[list[tuple[int, ...]]] = []
        self._open = threading.Event()
        self._open.set()
        engine = engine_of(server, model)
        explain = engine.explain

        def gated(images, *rest):
            self.batches.append([tuple(image[0, 0]) for image in images])
            assert self._open.wait(PATIENCE_S)
            return explain(images, *rest)

        engine.explain = gated

    @property
    def entered(self) -> int:
        """How many batches came to the device."""
        return len(self.batches)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Hold every batch that comes until the end of the block."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def close(self) -> None:
        """Hold every batch that comes."""
        self._open.clear()

    def open(self) -> None:
        """Let them go on."""
        self._open.set()
