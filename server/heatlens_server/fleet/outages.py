"""Looks after the models that serve: whether one hangs, and whether the process of one has ended."""

import asyncio
from collections.abc import Callable

from heatlens_server.core.errors import ModelInterrupted
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.isolated_engine import IsolatedEngine
from heatlens_server.fleet.served_model import ModelStatus, ServedModel
from heatlens_server.telemetry.stacks import stacks

WATCH_S = 1.0
"""How often the models are looked at, in seconds."""

_RETRY_S = 10.0


async def watch(fleet: Fleet, *, on_hang: Callable[[str], None]) -> None:
    """Take models that hang or crash out of service, and back in when they answer again; until this is cancelled.

    All callers of a model that hangs are answered ModelInterrupted, within `WATCH_S`; its process, if it has one, is
    ended and started again.

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
    isolated = [engine for engine in served.queue.engines if isinstance(engine, IsolatedEngine)]
    crashed = next((engine.outage for engine in isolated if engine.outage is not None), None)
    running_s = served.queue.batcher.hangs_s(served.hang_after_s)
    # A batch waits for a process that is started again because of its memory: that is no hang.
    if any(engine.ready_for_s < served.hang_after_s for engine in isolated):
        running_s = 0.0
    if running_s:
        outage = status.outage or ModelInterrupted(
            status.name, "hangs: what it runs does not end", retry_after_s=_RETRY_S
        )
        # Each time: calls that were on their way to the queue get there later.
        served.queue.answer_all(outage)
        if status.outage is None:
            said = f"hangs: what it runs has been running for {running_s:.0f} s; the threads:\n{stacks()}"
            await fleet.interrupt(status, outage, message=said)
            on_hang(status.name)
        for engine in isolated:
            engine.restart()
    elif crashed is not None:
        if status.outage is None:
            await fleet.interrupt(status, crashed, message=crashed.message.partition(" ")[2])
    elif status.outage is not None:
        said = "its process runs again" if isolated else "what it ran has ended after all"
        await fleet.interrupt(status, None, message=said)
