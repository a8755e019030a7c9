"""The models of a server as state: loaded, replaced and unloaded while others serve. Knows no transport.

A name has one status. Behind a READY one is a `ServedModel` with a generation: loading a name again gives the next.

* `load` builds in a thread. What goes wrong stays with the model: it is FAILED, and may be loaded again.
  What serves may have a better engine to follow: that is built beside it, and takes its place.
* `replace` builds beside what serves, puts the new model in its place once it is ready, and lets the old one finish.
* `unload` takes a model out at once: calls that wait are answered ModelUnloaded, batches that run are finished.

Streams of a model that is unloaded end with ModelUnloaded; those of one that is replaced go on for a while, unless they
asked to end; those that began before an engine took over go on. Whatever the old one's way out, its queue is closed
once no call uses it, and then its engine.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Protocol

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
from heatlens_server.fleet.builds import Builds, UnexpectedLoadError, close_aside, fault_of
from heatlens_server.fleet.served_model import ModelState, ModelStatus, ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_SHOWN_CHARACTERS = 80
"""How much of a caller's text an error repeats."""


def batch_size_of(config: ModelConfig, info: Capabilities) -> int:
    """How many images of a model run at once, at most."""
    return 1 if info.runs_one_by_one else config.batching.max_batch_size


class EndStreams(Protocol):
    """Ends streams of a model, with an error: all, or those that asked to end when their model is replaced."""

    def __call__(self, model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
        """See `api.stream.open_streams.OpenStreams.end_streams_of`."""


def _end_nothing(model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
    pass


async def _tell_nobody() -> None:
    pass


class Fleet:
    """The models of a server, in the order in which they were first loaded. Belongs to the event loop."""

    def __init__(
        self,
        *,
        build: Callable[[ModelConfig], BuiltModel],
        make_queue: Callable[[ModelConfig, SteppingEngine], ModelQueue],
        build_at_once: Callable[[ModelConfig], BuiltModel] | None = None,
        build_next: Callable[[ModelConfig], BuiltModel] | None = None,
        default: str = "",
        observer: Observer | None = None,
        publish: Callable[[], Awaitable[None]] = _tell_nobody,
        end_streams: EndStreams = _end_nothing,
        replaced_streams_s: float = 300.0,
    ) -> None:
        """Make a fleet without models.

        Args:
            build: makes a model's engine, on a thread of its own; raises ModelLoadError with a message for clients.
            make_queue: starts the threads that run an engine, which the queue owns from then on.
            build_at_once: does what `build` does for `load`, which need not wait for the engine that stays.
            build_next: makes the engine that a model's `next_engine` names; raises as `build`.
            default: the name that an empty name stands for; empty for the first model's.
            observer: told of every change of a model's state.
            publish: awaited after every change: whatever shows the states to clients.
            end_streams: ends the streams of a model that serves no longer, with an error.
            replaced_streams_s: how long streams may go on with a model that was replaced, in seconds.
        """
        self._build = build
        self._make_queue = make_queue
        self._build_at_once = build_at_once or build
        self._build_next = build_next or build
        self._default = default
        self._observer = observer or Observer()
        self._publish = publish
        self._end_streams = end_streams
        self._replaced_streams_s = replaced_streams_s
        self._statuses: dict[str, ModelStatus] = {}
        self._builds = Builds()
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

    @default.setter
    def default(self, name: str) -> None:
        self._default = name

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
        return self._start(self._load(config, self._builds.start(config, self._build_at_once)))

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
        before = self._statuses[config.name]
        followed = config.name in self._builds and bool(before.next_engine)
        if followed:
            # What was to follow is of the old one.
            self._builds.give_up(config.name, ModelUnloaded(config.name, "is replaced"))
        elif config.name in self._builds:
            raise ConfigError(f"the model {config.name!r} is being loaded or replaced")
        try:
            status = await self._ready(config, self._builds.start(config, self._build))
        except ModelLoadError as error:
            _log.error("model %s is not replaced: %s", config.name, with_causes(error), exc_info=fault_of(error))
            if followed:
                self._start(self._follow(before.config, self._builds.start(before.config, self._build_next)))
            raise
        old = self._statuses[config.name].served
        self._serve(status)
        if old is not None:
            self._supersede(old)
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
        self._builds.give_up(name, error)
        self._change(name, None)
        closing = None
        if status.served is not None:
            self._end_streams(status.served, error)
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
        self._builds.give_up_all(ServerDraining())

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
        return all(closed) and not self._builds.are_running

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

    def _serve(self, status: ModelStatus) -> None:
        assert status.served is not None
        engine = status.served.capabilities
        how = f"{engine.engine_name} on {engine.device} in {engine.precision}, layer {engine.layers[0]}"
        if status.next_engine:
            how += f"; {status.next_engine} takes over once the model is exported"
        self._change(status.name, status, how)
        if status.next_engine and not self._closed:
            self._start(self._follow(status.config, self._builds.start(status.config, self._build_next)))

    async def _follow(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> None:
        """Let the engine that was to follow take over. Calls and streams that began before are finished as they are."""
        try:
            status = await self._ready(config, build)
        except (ModelUnloaded, ServerDraining):
            return
        except ModelLoadError as error:
            serving = self._statuses[config.name]
            why = with_causes(error)
            _log.warning(
                "model %s is run by torch, not by %s: %s",
                config.name,
                serving.next_engine,
                why,
                exc_info=fault_of(error),
            )
            self._statuses[config.name] = replace(serving, next_engine="")
            return
        old = self._statuses[config.name].served
        self._serve(status)
        if old is not None:
            self._retire(old, ModelUnloaded.by_another(config.name))
        await self._publish()

    async def _load(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> None:
        await self._publish()
        try:
            status = await self._ready(config, build)
        except (ModelUnloaded, ServerDraining):
            return
        except asyncio.CancelledError:
            if self._statuses.get(config.name) == ModelStatus(config):
                message = "its loading was cancelled"
                self._change(config.name, ModelStatus(config, ModelState.FAILED, message=message), message)
            raise
        except ModelLoadError as error:
            status = ModelStatus(config, ModelState.FAILED, message=str(error))
            self._change(config.name, status, with_causes(error), fault=fault_of(error))
        else:
            self._serve(status)
        await self._publish()

    async def _ready(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> ModelStatus:
        """Wait for a build, and make what serves of it.

        Raises:
            ModelLoadError: whatever went wrong.
            ModelUnloaded, ServerDraining: it was given up.
        """
        built = await self._builds.wait(config, build)
        try:
            queue = self._make_queue(config, built.engine)
        except Exception as error:
            close_aside(built.engine)
            raise UnexpectedLoadError from error
        self._generations[config.name] += 1
        self._users[queue] = _Users()
        served = ServedModel(
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
        return ModelStatus(config, ModelState.READY, served, next_engine=built.next_engine)

    def _supersede(self, old: ServedModel) -> None:
        """Retire a model in whose place another answers: its streams go on for a while, unless they asked to end."""
        error = ModelUnloaded.by_another(old.name)
        self._end_streams(old, error, only_if_asked=True)
        loop = asyncio.get_running_loop()
        ending = loop.call_later(self._replaced_streams_s, self._end_streams, old, error)
        self._retire(old, error).add_done_callback(lambda _: ending.cancel())

    def _retire(self, model: ServedModel, error: Exception) -> "asyncio.Task[None]":
        """Close a model that serves no longer, once its calls are done."""
        self._retired.add(model.queue)
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
