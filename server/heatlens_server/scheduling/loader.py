"""Loading what engines need only for some requests, when the first of these comes, while others are answered."""

import asyncio
import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from heatlens_server.core.causes import with_causes
from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import CompanionFailed, ModelLoadError, QueueFull

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


@dataclass(frozen=True, slots=True)
class _Load:
    """A load that runs.

    Attributes:
        spec: what it loads for.
        ended: gets the reason why the load failed; None if it did not.
        thread: runs it.
    """

    spec: MapSpec
    ended: "asyncio.Future[ModelLoadError | None]"
    thread: threading.Thread


class EngineLoader:
    """Has the engines of one model load what a spec needs. Belongs to the event loop.

    There is one load at a time, in a thread of its own, which all callers that need it wait for. It goes on if they
    leave. After one that failed, the next caller starts another.
    """

    def __init__(self, engines: Sequence[SteppingEngine], *, model: str, max_waiting: int) -> None:
        """Load nothing yet. Must be called on the event loop.

        Args:
            engines: told to load.
            model: the model's name.
            max_waiting: most callers that wait for a load: each holds its image.
        """
        self._engines = engines
        self._model = model
        self._max_waiting = max_waiting
        self._loop = asyncio.get_running_loop()
        self._waiting = 0
        self._load: _Load | None = None

    @property
    def loading(self) -> bool:
        """Whether a thread is loading."""
        return self._load is not None and self._load.thread.is_alive()

    async def load(self, spec: MapSpec) -> MapSpec:
        """Start a load for a spec, unless one runs, and wait for the load's end.

        Returns:
            What was loaded for: another spec if a load ran.

        Raises:
            CompanionFailed: it cannot be loaded.
            QueueFull: too many callers wait for that already.
            Exception: what `give_up` was told.
        """
        load = self._load or self._start(spec)
        if self._waiting >= self._max_waiting:
            raise QueueFull(
                f"{self._max_waiting} requests are waiting for a part of the model to be loaded",
                metadata={"max_queue_length": str(self._max_waiting)},
                retry_after_s=_RETRY_S,
            )
        self._waiting += 1
        try:
            # Shielded: others wait for it too.
            error = await asyncio.shield(load.ended)
        finally:
            self._waiting -= 1
        if error is not None:
            raise CompanionFailed(self._model, str(error)) from None
        return load.spec

    def give_up(self, error: Exception) -> None:
        """Callers that wait for a load wait no longer: `load` raises `error` to them. The load itself goes on."""
        if self._load is not None and not self._load.ended.done():
            self._load.ended.set_exception(error)
            # Counts as retrieved, should no caller wait.
            self._load.ended.exception()

    def _start(self, spec: MapSpec) -> _Load:
        ended: asyncio.Future[ModelLoadError | None] = self._loop.create_future()
        # A daemon: a download may hang for minutes, and must not keep a draining process alive.
        thread = threading.Thread(target=self._run, args=(spec, ended), name=f"load-{self._model}", daemon=True)
        self._load = _Load(spec, ended, thread)
        _log.info("model %s: loading what %s needs", self._model, spec.method)
        thread.start()
        return self._load

    def _run(self, spec: MapSpec, ended: "asyncio.Future[ModelLoadError | None]") -> None:
        error = None
        try:
            for engine in self._engines:
                engine.load_for(spec)
        except ModelLoadError as raised:
            _log.warning("model %s: what %s needs cannot be loaded: %s", self._model, spec.method, with_causes(raised))
            error = raised
        except BaseException:
            _log.exception("model %s: what %s needs cannot be loaded", self._model, spec.method)
            error = ModelLoadError("an unexpected error while loading; the server's log has it")
        # After a drain the loop is closed and no caller waits.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end, ended, error)

    def _end(self, ended: "asyncio.Future[ModelLoadError | None]", error: ModelLoadError | None) -> None:
        self._load = None
        if not ended.done():
            ended.set_result(error)
