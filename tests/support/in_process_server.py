"""Reaching into a server on the test's own loop: a model's queue and engine, and a device that stops when told."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.entry import Source

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
    (engine,) = server.fleet.get(model).queue.engines
    return engine


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
        self._model = server.fleet.get(model)
        self._open = threading.Event()
        self._open.set()
        self._inside = False
        engine = engine_of(server, model)
        explain = engine.explain

        def gated(images, *rest):
            self.batches.append([tuple(image[0, 0]) for image in images])
            self._inside = True
            assert self._open.wait(PATIENCE_S)
            self._inside = False
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

    async def fill(self) -> None:
        """Close, and have a batch in the device and one ahead of it: all images that come now wait in the queue.

        A batch that is in the device stays; the rest are black images of the gate's own.
        """
        self.close()
        if not self._inside:
            await self._add_own()
        await self._add_own()

    async def _add_own(self) -> None:
        height_px, width_px = self._model.preprocess.crop_px
        region = PixelBox(0, 0, width_px, height_px)
        black = FittedImage(np.zeros((height_px, width_px, 3), np.uint8), region, width_px, height_px)
        spec = MapSpec(self._model.default_method, self._model.capabilities.layers[:1], upsample=False)
        ticket = self._model.queue.submit(lambda: black, TopK(1), spec, timeout_s=None, source=Source())
        await until(lambda: self._inside and not ticket.waiting)
