"""The models of a server as state: loaded, replaced and unloaded while others serve. Knows no transport.

A name has one status. Behind a READY one is a `ServedModel` with a generation: loading a name again gives the next.

* `load` builds in a thread. What goes wrong stays with the model: it is FAILED, and may be loaded again.
* `replace` builds beside what serves, puts the new model in its place once it is ready, and lets the old one finish.
* `unload` takes a model out at once: calls that wait are answered ModelUnloaded, batches that run are finished.

Whatever its way out, the old model's streams end with ModelUnloaded, its queue is closed, and then its engine.
"""

import asyncio
import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace

from heatlens_server.config import ModelConfig
from heatlens_server.core.causes import with_causes
from heatlens_server.core.engine import Capabilities, SteppingEngine
from heatlens_server.core.errors import (
    ConfigError,
    ModelFailed,
    ModelInterrupted,
    ModelLoadError,
    ModelLoading,
    ModelNotFound,
    ModelUnloaded,
    ServerDraining,
)
from heatlens_server.core.events import Observer
from heatlens_server.fleet.build import BuiltModel
from heatlens_server.fleet.served_model import ModelState, ModelStatus, ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_SHOWN_CHARACTERS = 80
"""How much of a caller's text an error repeats."""


def batch_size_of(config: ModelConfig, info: Capabilities) -> int:
    """How many images of a model run at once, at most."""
    return 1 if info.runs_one_by_one else config.batching.max_batch_size


async def _tell_nobody() -> None:
    pass


class Fleet:
    """The models of a server, in the order in which they were first loaded. Belongs to the event loop."""

    def __init__(
        self,
        *,
        build: Callable[[ModelConfig], BuiltModel],
        make_queue: Callable[[ModelConfig, SteppingEngine], ModelQueue],
        default: str = "",
        observer: Observer | None = None,
        publish: Callable[[], Awaitable[None]] = _tell_nobody,
        end_streams: Callable[[ServedModel, Exception], None] = lambda _model, _error: None,
    ) -> None:
        """Make a fleet without models.

        Args:
            build: makes a model's engine, on a thread of its own; raises ModelLoadError with a message for clients.
            make_queue: starts the threads that run an engine, which the queue owns from then on.
            default: the name that an empty name stands for; empty for the first model's.
            observer: told of every change of a model's state.
            publish: awaited after every change: whatever shows the states to clients.
            end_streams: ends the streams of a model that serves no longer, with an error.
        """
        self._build = build
        self._make_queue = make_queue
        self._default = default
        self._observer = observer or Observer()
        self._publish = publish
        self._end_streams = end_streams
        self._statuses: dict[str, ModelStatus] = {}
        self._builds: dict[str, asyncio.Future[BuiltModel]] = {}
        self._threads: set[threading.Thread] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations = Counter[str]()
        # Of models that serve no longer and are not closed yet.
        self._retired: set[ModelQueue] = set()
        self._users: dict[ModelQueue, _Users] = {}
        self._closed = False

    def __iter__(self) -> Iterator[ModelStatus]:
        """The status of every model, in order: a snapshot."""
        return iter(tuple(self._statuses.values()))

    @property
    def default(self) -> str:
        """The name that an empty name stands for; empty if there is no model."""
        return self._default or next(iter(self._statuses), "")

    @property
    def max_batch_size(self) -> int:
        """The largest of any model; 0 if there is none."""
        return max((status.config.batching.max_batch_size for status in self), default=0)

    @property
    def max_delay_s(self) -> float:
        """The longest batching window of any model, in seconds."""
        return max((status.config.batching.max_delay_ms for status in self), default=0.0) / 1e3

    def get(self, name: str) -> ServedModel:
        """The ready model of that name; the default one for an empty name.

        Raises:
            ModelNotFound: there is none.
            ModelLoading: not yet.
            ModelFailed: it could not be loaded.
            ModelInterrupted: it served, and cannot for now.
        """
        status = self._statuses.get(name or self.default)
        if status is None:
            raise ModelNotFound(name[:_SHOWN_CHARACTERS], list(self._statuses))
        if status.outage is not None:
            raise status.outage.with_traceback(None)
        if status.served is not None:
            return status.served
        if status.state is ModelState.FAILED:
            raise ModelFailed(status.name, status.message)
        raise ModelLoading(f"model {status.name!r} is loading", metadata={"model": status.name}, retry_after_s=_RETRY_S)

    @contextlib.contextmanager
    def use(self, name: str) -> Iterator[ServedModel]:
        """`get` for one call: the model finishes it even if it is replaced meanwhile.

        Raises:
            HeatlensError: as `get`.
        """
        model = self.get(name)
        with self._users[model.queue]:
            yield model

    # Loading.

    def load(self, config: ModelConfig) -> "asyncio.Task[None]":
        """Begin to load a model, which is LOADING from now on.

        Returns:
            A task that ends once the model is READY, FAILED or unloaded, and raises nothing.

        Raises:
            ConfigError: there is a model of that name, and it has not FAILED.
            ServerDraining: the fleet is closed.
        """
        self._check_open()
        status = self._statuses.get(config.name)
        if status is not None and status.state is not ModelState.FAILED:
            raise ConfigError(f"there is a model {config.name!r} already")
        self._change(config.name, ModelStatus(config))
        return self._start(self._load(config, self._start_build(config)))

    async def replace(self, config: ModelConfig) -> None:
        """Load a model beside the one of the same name, and let it serve in its place once it is ready.

        Calls that began with the old model are finished by it. If the new one cannot be loaded, the old one goes on.

        Raises:
            ConfigError: the model is being loaded or replaced.
            ModelNotFound: there is no model of that name.
            ModelLoadError: the new one cannot be loaded; the message may be shown to clients.
            ModelUnloaded: the model was unloaded meanwhile.
            ServerDraining: the fleet is closed.
        """
        self._check_open()
        if config.name not in self._statuses:
            raise ModelNotFound(config.name, list(self._statuses))
        if config.name in self._builds:
            raise ConfigError(f"the model {config.name!r} is being loaded or replaced")
        try:
            served = await self._served(config, self._start_build(config))
        except ModelLoadError as error:
            _log.error("model %s is not replaced: %s", config.name, with_causes(error), exc_info=_fault(error))
            raise
        old = self._statuses[config.name].served
        self._serve(config, served)
        if old is not None:
            self._retire(old, ModelUnloaded(config.name, "was replaced; the new one answers", retry_after_s=0.0))
        await self._publish()

    async def unload(self, name: str) -> None:
        """Take a model out of the fleet, and close it; one that is being loaded is closed once it is.

        Returns when the batch that runs is finished and the engine is closed, or when the batch hangs.

        Raises:
            ModelNotFound: there is none of that name.
        """
        status = self._statuses.get(name)
        if status is None:
            raise ModelNotFound(name[:_SHOWN_CHARACTERS], list(self._statuses))
        error = ModelUnloaded(name, "was unloaded")
        self._give_up_build(name, error)
        self._change(name, None)
        closing = None
        if status.served is not None:
            closing = self._retire(status.served, error)
            status.served.queue.give_up(error)
        await self._publish()
        if closing is not None:
            await asyncio.shield(closing)

    async def interrupt(self, status: ModelStatus, outage: ModelInterrupted | None, *, message: str) -> None:
        """Say that a model that serves cannot for now, or, with None, can again; its streams end.

        Args:
            status: its present one; nothing happens if it has changed.
            outage: what its callers are told from now on.
            message: why, for the operator.
        """
        if self._statuses.get(status.name) is not status or status.served is None:
            return
        state = ModelState.READY if outage is None else ModelState.UNAVAILABLE
        told = "" if outage is None else outage.message
        self._change(status.name, replace(status, state=state, message=told, outage=outage), message)
        if outage is not None:
            self._end_streams(status.served, outage)
        await self._publish()

    # The end.

    def stop_loading(self) -> None:
        """Load nothing any more, and give up what is being loaded. Models that are ready go on. Idempotent."""
        self._closed = True
        for name in list(self._builds):
            self._give_up_build(name, ServerDraining())

    def give_up(self, error: Exception, *, running: bool = False) -> None:
        """Answer with an error all that waits for a model; with `running` also what is in a batch that runs."""
        for queue in self._queues():
            queue.give_up(error, running=running)

    async def close(self, *, timeout_s: float | None = None) -> bool:
        """Finish what was admitted and close every engine. Idempotent.

        Returns:
            False if the time ran out, or a model is still being loaded: that thread cannot be interrupted.
        """
        self.stop_loading()
        closed = await asyncio.gather(*(queue.close(timeout_s=timeout_s) for queue in self._queues()))
        return all(closed) and not any(thread.is_alive() for thread in self._threads)

    def _queues(self) -> list[ModelQueue]:
        serving = [status.served.queue for status in self if status.served is not None]
        return [*serving, *self._retired]

    def _check_open(self) -> None:
        if self._closed:
            raise ServerDraining

    def _start(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _change(
        self, name: str, status: ModelStatus | None, message: str = "", *, fault: Exception | None = None
    ) -> None:
        """The only place where a model's state changes: None takes the model out."""
        if status is None:
            del self._statuses[name]
        else:
            self._statuses[name] = status
        state = "unloaded" if status is None else status.state.value
        self._observer.model_changed(model=name, state=state, message=message, fault=fault)

    def _serve(self, config: ModelConfig, served: ServedModel) -> None:
        engine = served.capabilities
        how = f"{engine.engine_name} on {engine.device} in {engine.precision}, layer {engine.layers[0]}"
        self._change(config.name, ModelStatus(config, ModelState.READY, served), how)

    async def _load(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> None:
        await self._publish()
        try:
            served = await self._served(config, build)
        except (ModelUnloaded, ServerDraining):
            return
        except asyncio.CancelledError:
            if self._statuses.get(config.name) == ModelStatus(config):
                message = "its loading was cancelled"
                self._change(config.name, ModelStatus(config, ModelState.FAILED, message=message), message)
            raise
        except ModelLoadError as error:
            status = ModelStatus(config, ModelState.FAILED, message=str(error))
            self._change(config.name, status, with_causes(error), fault=_fault(error))
        else:
            self._serve(config, served)
        await self._publish()

    async def _served(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> ServedModel:
        """Wait for a build, and make what serves of it.

        Raises:
            ModelLoadError: whatever went wrong.
            ModelUnloaded, ServerDraining: it was given up.
        """
        built = await self._built(config, build)
        try:
            queue = self._make_queue(config, built.engine)
        except Exception as error:
            self._close_aside(built.engine)
            raise _Unexpected from error
        self._generations[config.name] += 1
        self._users[queue] = _Users()
        return ServedModel(
            name=config.name,
            version=built.version,
            labels=built.labels,
            preprocess=built.preprocess,
            capabilities=built.engine.info,
            default_method=built.method,
            max_batch_size=batch_size_of(config, built.engine.info),
            max_delay_s=config.batching.max_delay_ms / 1e3,
            queue=queue,
            hang_after_s=config.hang_after_s,
            assumptions=built.assumptions,
            generation=self._generations[config.name],
        )

    async def _built(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> BuiltModel:
        """Wait for a build; what was given up, or is waited for no longer, is closed.

        Raises: as `_served`.
        """
        try:
            built = await build
        except (ModelLoadError, ModelUnloaded, ServerDraining):
            raise
        except Exception as error:
            raise _Unexpected from error
        except asyncio.CancelledError:
            if build.done() and not build.cancelled() and build.exception() is None:
                self._close_aside(build.result().engine)
            raise
        finally:
            is_wanted = self._builds.get(config.name) is build
            if is_wanted:
                del self._builds[config.name]
        if not is_wanted:
            # Given up between the end of the thread and this task's turn.
            self._close_aside(built.engine)
            raise ModelUnloaded(config.name, "was unloaded")
        return built

    def _start_build(self, config: ModelConfig) -> "asyncio.Future[BuiltModel]":
        """Build in a daemon thread: a download may hang for minutes, and must not keep a draining process alive."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[BuiltModel] = loop.create_future()

        def settle(built: BuiltModel | None, error: Exception | None) -> None:
            self._threads.discard(thread)
            if future.done():
                if built is not None:
                    self._close_aside(built.engine)
            elif built is None:
                future.set_exception(error or RuntimeError("nothing was built"))
            else:
                future.set_result(built)

        def run() -> None:
            built, error = None, None
            try:
                built = self._build(config)
            except Exception as raised:
                error = raised
            except BaseException as raised:
                error = ModelLoadError(f"the model's code raised {type(raised).__name__}")
                error.__cause__ = raised
            # After the server's end the loop is closed and no task waits for this model.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, built, error)

        thread = threading.Thread(target=run, name=f"load-{config.name}", daemon=True)
        self._threads.add(thread)
        self._builds[config.name] = future
        thread.start()
        return future

    @staticmethod
    def _close_aside(engine: SteppingEngine) -> None:
        """Close an engine that never served: on another thread, as that may take a moment."""
        asyncio.get_running_loop().run_in_executor(None, engine.close)

    def _give_up_build(self, name: str, error: Exception) -> None:
        build = self._builds.pop(name, None)
        if build is not None and not build.done():
            build.set_exception(error)
            # Counts as retrieved, should the task that waits for it be cancelled.
            build.exception()

    def _retire(self, model: ServedModel, error: Exception) -> "asyncio.Task[None]":
        """Close a model that serves no longer, once its calls are done."""
        self._retired.add(model.queue)
        self._end_streams(model, error)
        return self._start(self._finish(model, error))

    async def _finish(self, model: ServedModel, error: Exception) -> None:
        queue, users = model.queue, self._users[model.queue]
        while not users.gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(users.gone.wait(), model.hang_after_s)
            if queue.batcher.hangs_s(model.hang_after_s):
                queue.give_up(error, running=True)
        if not await queue.close(error, timeout_s=model.hang_after_s):
            _log.error("model %s: what it runs does not end, and keeps its thread and memory", model.name)
        self._retired.discard(queue)
        del self._users[queue]


class _Unexpected(ModelLoadError):
    """Loading failed in a way that nobody expected: its cause may hold anything, and goes to the log alone."""

    def __init__(self) -> None:
        super().__init__("an unexpected error while loading; the server's log has it")


def _fault(error: ModelLoadError) -> Exception | None:
    """What the log shows the traceback of."""
    return error if isinstance(error, _Unexpected) else None


class _Users:
    """Counts the calls that use a model: `with users:` around each."""

    def __init__(self) -> None:
        self._count = 0
        self.gone = asyncio.Event()
        self.gone.set()

    def __enter__(self) -> None:
        self._count += 1
        self.gone.clear()

    def __exit__(self, *_error: object) -> None:
        self._count -= 1
        if not self._count:
            self.gone.set()
