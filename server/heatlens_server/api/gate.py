"""Counting calls in flight, and refusing new ones once the server drains."""

import asyncio
from types import TracebackType

from heatlens_server.core.errors import ServerDraining

_RETRY_S = 1.0


def draining() -> ServerDraining:
    """The error for whoever comes, or is still waiting, while the server shuts down."""
    return ServerDraining("the server is shutting down", retry_after_s=_RETRY_S)


class CallGate:
    """`with gate:` around a call. Belongs to the event loop."""

    def __init__(self) -> None:
        """Make an open gate."""
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        """Count a call in.

        Raises:
            ServerDraining: the gate is closed.
        """
        if self._draining:
            raise draining()
        self._in_flight += 1
        self._idle.clear()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Count a call out."""
        self._in_flight -= 1
        if self._in_flight == 0:
            self._idle.set()

    async def close(self, timeout_s: float) -> bool:
        """Refuse new calls from now on, and wait for those in flight.

        Returns:
            False if some are still in flight when the time is over.
        """
        self._draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
