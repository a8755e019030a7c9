"""Looks after the models that serve: whether one hangs."""

import asyncio
from collections.abc import Callable

from heatlens_server.core.errors import ModelInterrupted
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.served_model import ModelStatus, ServedModel

WATCH_S = 1.0
"""How often the models are looked at, in seconds."""

_RETRY_S = 10.0


async def watch(fleet: Fleet, *, on_hang: Callable[[str], None]) -> None:
    """Take models that hang out of service, and back in when they answer again; until this is cancelled.

    All callers of a model that hangs are answered ModelInterrupted, within `WATCH_S`.

    Args:
        fleet: whose models.
        on_hang: called with a model's name when it begins to hang.
    """
    while True:
        await asyncio.sleep(WATCH_S)
        for status in fleet:
            if status.served is not None:
                await _look_at(fleet, status, status.served, on_hang)


async def _look_at(fleet: Fleet, status: ModelStatus, served: ServedModel, on_hang: Callable[[str], None]) -> None:
    running_s = served.queue.batcher.hangs_s(served.hang_after_s)
    if running_s:
        outage = status.outage or ModelInterrupted(
            status.name, "hangs: what it runs does not end", retry_after_s=_RETRY_S
        )
        # Each time: calls that were on their way to the queue get there later.
        served.queue.answer_all(outage)
        if status.outage is None:
            await fleet.interrupt(status, outage, message=f"hangs: what it runs has been running for {running_s:.0f} s")
            on_hang(status.name)
    elif status.outage is not None:
        await fleet.interrupt(status, None, message="what it ran has ended after all")
