"""Looks after the models that serve: whether one hangs, and whether the process of one has ended."""

import asyncio
import logging
import math
from collections.abc import Callable

from heatlens_server.core.errors import ModelInterrupted
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.isolated_engine import IsolatedEngine
from heatlens_server.fleet.served_model import ModelStatus, ServedModel
from heatlens_server.telemetry.stacks import stacks

_log = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often the models are looked at, in seconds."""

_RETRY_S = 10.0


async def watch(fleet: Fleet, *, on_hang: Callable[[str], None]) -> None:
    """Take models that hang or crash out of service, and back in when they answer again; until this is cancelled.

    All callers of a model that hangs are answered ModelInterrupted, within `WATCH_S`; its process, if it has one, is
    ended and started again. Where a model has other devices, one that hangs is taken out, and only what it runs is
    answered so.

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
    queue, hang_after_s = served.queue, served.hang_after_s
    isolated = {i: engine for i, engine in enumerate(queue.engines) if isinstance(engine, IsolatedEngine)}
    # A batch waits for a process that is started again because of its memory: that is no hang.
    awaited = [i for i, engine in isolated.items() if engine.ready_for_s < hang_after_s]
    for hanging in queue.batcher.devices.take_out_hanging(hang_after_s, spared=awaited):
        name = queue.devices[hanging.device].name
        _log.error("model %s: %s hangs, and others go on; the threads:\n%s", status.name, name, stacks())
        queue.answer(
            hanging.entries,
            ModelInterrupted(status.name, "hangs on the device that ran this request", retry_after_s=0.0),
        )
        if hanging.device in isolated:
            isolated[hanging.device].restart()
    running_s = queue.batcher.devices.hangs_s(hang_after_s)
    outages = [engine.outage for engine in isolated.values()]
    crashed = outages[0] if len(outages) == len(queue.engines) and all(outages) else None
    if running_s == math.inf or crashed is not None:
        outage = crashed or ModelInterrupted(
            status.name, "fails on all of its devices", reason="DEVICES_FAILED", retry_after_s=_RETRY_S
        )
        if len(queue.engines) > 1:
            # No device takes what waits.
            queue.answer_all(status.outage or outage)
        if status.outage is None:
            await fleet.interrupt(status, outage, message=outage.message.partition(f"{status.name!r} ")[2])
    elif running_s and not awaited:
        outage = status.outage or ModelInterrupted(
            status.name, "hangs: what it runs does not end", retry_after_s=_RETRY_S
        )
        # Each time: calls that were on their way to the queue get there later.
        queue.answer_all(outage)
        if status.outage is None:
            said = f"hangs: what it runs has been running for {running_s:.0f} s; the threads:\n{stacks()}"
            await fleet.interrupt(status, outage, message=said)
            on_hang(status.name)
        for engine in isolated.values():
            engine.restart()
    elif status.outage is not None:
        said = "its process runs again" if isolated else "what it ran has ended after all"
        await fleet.interrupt(status, None, message="a device works again" if len(queue.engines) > 1 else said)
