"""Loading what an engine needs only for some requests, when the first of them comes, while others are answered."""

import asyncio
import contextlib
import logging
import threading
from dataclasses import dataclass

from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import CompanionFailed, ModelLoadError, QueueFull

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Load:
    """What is being loaded.

    Attributes:
        spec: for which spec.
        ended: resolved with why it failed; with None if it did not.
        thread: that loads.
    """

    spec: MapSpec
    ended: "asyncio.Future[ModelLoadError | None]"
    thread: threading.Thread


class Readiness:
    """Whether an engine has all that a spec needs. Belongs to the event loop.

    There is one load at a time, in a thread of its own, which everybody who needs it waits for. It goes on if they
    leave. One that failed is tried again by whoever comes next.
    """

    def __init__(self, engine: SteppingEngine, *, name: str, max_waiting: int) -> None:
        """Load nothing yet. Must be called on the event loop.

        Args:
            engine: asked, and told to prepare.
            name: the model's name.
            max_waiting: most callers that wait for a load: each holds its image.
        """
        self._engine = engine
        self._name = name
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._waiting = 0
        self._load: _Load | None = None

    @property
    def loading(self) -> bool:
        """Whether a thread is loading."""
        return self._load is not None and self._load.thread.is_alive()

    async def ensure(self, spec: MapSpec) -> None:
        """Return once the engine can run a spec; at once if it can.

        Raises:
            CompanionFailed: what it needs cannot be loaded.
            QueueFull: too many wait for that already.
            Exception: what `give_up` was told.
        """
        while not self._engine.ready(spec):
            load = self._load or self._start(spec)
            error = await self._end_of(load)
            if error is not None:
                raise CompanionFailed(self._name, str(error)) from None
            if load.spec == spec:
                return

    def give_up(self, error: Exception) -> None:
        """Whoever waits for a load waits no longer: their `ensure` raises `error`. The load itself goes on."""
        if self._load is not None and not self._load.ended.done():
            self._load.ended.set_exception(error)
            # Counts as retrieved, should nobody wait.
            self._load.ended.exception()

    async def _end_of(self, load: _Load) -> ModelLoadError | None:
        if self._waiting >= self._max_waiting:
            raise QueueFull(
                f"{self._max_waiting} requests are waiting for a part of the model to be loaded",
                metadata={"max_queue_length": str(self._max_waiting)},
                retry_after_s=_RETRY_S,
            )
        self._waiting += 1
        try:
            # Shielded: others wait for it too.
            return await asyncio.shield(load.ended)
        finally:
            self._waiting -= 1

    def _start(self, spec: MapSpec) -> _Load:
        ended: asyncio.Future[ModelLoadError | None] = self._loop.create_future()
        # A daemon: a download may hang for minutes, and must not keep a draining process alive.
        thread = threading.Thread(target=self._run, args=(spec, ended), name=f"prepare-{self._name}", daemon=True)
        self._load = _Load(spec, ended, thread)
        _log.info("model %s: loading what %s needs", self._name, spec.method)
        thread.start()
        return self._load

    def _run(self, spec: MapSpec, ended: "asyncio.Future[ModelLoadError | None]") -> None:
        error = None
        try:
            self._engine.prepare(spec)
        except ModelLoadError as raised:
            _log.warning("model %s: what %s needs cannot be loaded: %s", self._name, spec.method, raised)
            error = raised
        except BaseException:
            _log.exception("model %s: what %s needs cannot be loaded", self._name, spec.method)
            error = ModelLoadError("an unexpected error while loading; the server's log has it")
        # After a drain the loop is closed and nobody waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, ended, error)

    def _end(self, ended: "asyncio.Future[ModelLoadError | None]", error: ModelLoadError | None) -> None:
        self._load = None
        if not ended.done():
            ended.set_result(error)
