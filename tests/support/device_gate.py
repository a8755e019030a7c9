"""A device that stops when told: batches are held inside of the engine, as long as the gate is closed."""

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heatlens_server.app import Server

PATIENCE_S = 30.0


class DeviceGate:
    """Open at first. Belongs to one model of a server on the test's own loop.

    Attributes:
        entered: batches that came to the device.
    """

    def __init__(self, server: "Server", model: str) -> None:
        self.entered = 0
        self._open = threading.Event()
        self._open.set()
        engine = server.registry.get(model).queue._engine
        explain = engine.explain

        def gated(images, *rest):
            self.entered += 1
            assert self._open.wait(PATIENCE_S)
            return explain(images, *rest)

        engine.explain = gated

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Hold every batch that comes until the end of the block."""
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def open(self) -> None:
        """Let them go on."""
        self._open.set()
