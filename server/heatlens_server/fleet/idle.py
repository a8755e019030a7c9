"""Models that are used little: unloaded after a time, or when their memory is needed, and loaded again on request.

Nothing that a call or a stream uses is unloaded.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heatlens_server.core.causes import with_causes
from heatlens_server.core.errors import ModelFailed, ModelLoadError, ModelLoading
from heatlens_server.fleet.builds import fault_of
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.fleet.uses import Uses
from heatlens_server.fleet.versions import Point, at_the_start, choose

if TYPE_CHECKING:
    from heatlens_server.fleet.fleet import Fleet

_log = logging.getLogger(__name__)

WATCH_S = 1.0
"""How often the models are looked at, in seconds."""

_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Resting:
    """A model that may be unloaded.

    Attributes:
        status: its.
        devices: where it is.
        idle_s: for how long nobody has used it, in seconds.
    """

    status: ModelStatus
    devices: frozenset[str]
    idle_s: float


class IdleModels:
    """Which models of a fleet rest. Belongs to the event loop."""

    def __init__(self, fleet: "Fleet", uses: Uses, budget_bytes: Mapping[str, int]) -> None:
        """No model rests yet.

        Args:
            fleet: whose models.
            uses: who uses them.
            budget_bytes: what the models on a device may take, by device; none for the others.
        """
        self._fleet = fleet
        self._uses = uses
        self._budget_bytes = budget_bytes
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._one_at_a_time = asyncio.Lock()
        # By key: calls that wait for a model, and will use it.
        self._waiting = Counter[str]()
        # Devices whose models take more than the budget.
        self._beyond: set[str] = set()

    async def awake(self, name: str, version: str = "", point: Point = at_the_start) -> None:
        """Wait until the model for a request is loaded, if it rests; other requests meanwhile wait for the same load.

        What is used in the same turn of the event loop is there. Arguments: as `Fleet.get`.

        Raises:
            ModelNotFound: there is none.
            ModelFailed: it cannot be loaded; the next request tries again.
            ModelLoading: it has no room, as all others on its device are used.
            ModelUnloaded, ServerDraining: so it was meanwhile.
        """
        while (status := choose(self._fleet, name or self._fleet.default, version, point)).state is ModelState.IDLE:
            load = self._loads.get(status.key) or self._start(status)
            self._waiting[status.key] += 1
            try:
                # Shielded: others wait for it too.
                await asyncio.shield(load)
            finally:
                self._waiting[status.key] -= 1

    async def look(self) -> None:
        """Unload the models that nobody has used for their `idle_unload_s`, and those beyond a device's budget."""
        for one in self._resting():
            after_s = one.status.config.idle_unload_s
            # Asked again for each: closing the one before takes a moment.
            if 0 < after_s <= one.idle_s and self._fleet.may_rest(one.status):
                await self._fleet.rest(one.status, f"nobody has used it for {after_s:g} s")
        for device, budget_bytes in self._budget_bytes.items():
            fits = await self._make_room(device)
            if not fits and device not in self._beyond:
                _log.warning(
                    "the models on %s take %d bytes, beyond the memory_budget_bytes of %d, and all are used",
                    device,
                    sum(self._held(device)),
                    budget_bytes,
                )
            (self._beyond.discard if fits else self._beyond.add)(device)

    async def _make_room(self, device: str, size_bytes: int = 0) -> bool:
        """Unload models, the least recently used first, until a device has room for so many bytes more.

        Returns:
            Whether there is room, or, as far as the budget goes, one model alone.
        """
        budget_bytes = self._budget_bytes.get(device)
        while budget_bytes is not None and sum(self._held(device)) + size_bytes > budget_bytes:
            # A model that is larger than the budget is served, alone.
            if len(self._held(device)) <= (0 if size_bytes else 1):
                return True
            resting = [one for one in self._resting() if device in one.devices]
            if not resting:
                return False
            await self._fleet.rest(max(resting, key=lambda one: one.idle_s).status, "its memory is needed")
        return True

    def _resting(self) -> list["_Resting"]:
        found = []
        for status in self._fleet:
            if status.served is not None and self._fleet.may_rest(status) and not self._waiting[status.key]:
                idle_s = self._uses.idle_s(status.served) or 0.0
                found.append(_Resting(status, frozenset(status.served.weights_bytes()), idle_s))
        return found

    def _held(self, device: str) -> list[int]:
        """What each model on a device takes, in bytes."""
        serving = [status.served for status in self._fleet if status.served is not None]
        held = [model.weights_bytes() for model in (*serving, *self._uses.retired)]
        return [size[device] for size in held if device in size]

    def _start(self, status: ModelStatus) -> "asyncio.Task[None]":
        load = self._loads[status.key] = asyncio.create_task(self._load(status))
        load.add_done_callback(lambda _: self._loads.pop(status.key))
        # Counts as retrieved, should no caller wait.
        load.add_done_callback(lambda done: done.cancelled() or done.exception())
        return load

    async def _load(self, status: ModelStatus) -> None:
        has_budget = not self._budget_bytes.keys().isdisjoint(status.known_bytes)
        # One after the other: two would have the same room.
        async with self._one_at_a_time if has_budget else contextlib.nullcontext():
            if not all([await self._make_room(*one) for one in status.known_bytes.items()]):
                raise ModelLoading(
                    f"model {status.name!r} is not loaded, and the others on its device are all used",
                    reason="MODEL_MEMORY_FULL",
                    metadata={"model": status.name},
                    retry_after_s=_RETRY_S,
                )
            if not any(one.key == status.key and one.state is ModelState.IDLE for one in self._fleet):
                return
            try:
                await self._fleet.restore(status.key)
            except ModelLoadError as error:
                _log.error("model %s is not loaded again: %s", status.key, with_causes(error), exc_info=fault_of(error))
                raise ModelFailed(status.name, str(error)) from error


async def watch_idle(fleet: "Fleet") -> None:
    """Unload models that nobody uses, until this is cancelled."""
    while True:
        await asyncio.sleep(WATCH_S)
        await fleet.idle.look()
