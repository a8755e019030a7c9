"""The models of a server as state: loaded, replaced and unloaded while others serve. Knows no transport.

A version of a model has one status, and several may share a name; `versions.py` says which one a request gets. Behind a
READY one is a `ServedModel` with a generation: loading a name again gives the next.

* `load` builds in a thread. What goes wrong stays with the model: it is FAILED, and may be loaded again.
  What serves may have a better engine to follow: that is built beside it, and takes its place.
* `replace` builds beside what serves, puts the new model in its place once it is ready, and lets the old one finish.
* `unload` takes a model out at once: calls that wait are answered ModelUnloaded, batches that run are finished. A
  version beside which another answers goes as one that is replaced.

Streams of a model that is unloaded end with ModelUnloaded; those of one that is replaced go on for a while, unless they
asked to end; those that began before an engine took over go on. Whatever the old one's way out, its queue is closed
once no call uses it, and then its engine.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Coroutine, Iterator, Mapping, Sequence
from dataclasses import replace

from heatlens_server.config import ModelConfig
from heatlens_server.core.causes import with_causes
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import (
    ConfigError,
    ModelFailed,
    ModelInterrupted,
    ModelLoadError,
    ModelLoading,
    ModelUnloaded,
    ServerDraining,
)
from heatlens_server.core.events import Observer
from heatlens_server.fleet.builds import Builds, UnexpectedLoadError, close_aside, fault_of
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.idle import IdleModels
from heatlens_server.fleet.served_model import ModelState, ModelStatus, ServedModel, batch_size_of
from heatlens_server.fleet.uses import EndStreams, Uses, end_nothing
from heatlens_server.fleet.versions import Point, at_the_start, choose, find
from heatlens_server.scheduling.model_queue import ModelQueue

_log = logging.getLogger(__name__)

_RETRY_S = 1.0


async def _tell_nobody() -> None:
    pass


class Fleet:
    """The models of a server, in the order in which they were first loaded. Belongs to the event loop.

    Attributes:
        idle: unloads models that are used little, and loads them again.
    """

    def __init__(
        self,
        *,
        build: Callable[[ModelConfig], BuiltModel],
        make_queue: Callable[[ModelConfig, Sequence[SteppingEngine]], ModelQueue],
        build_at_once: Callable[[ModelConfig], BuiltModel] | None = None,
        build_next: Callable[[ModelConfig], BuiltModel] | None = None,
        default: str = "",
        observer: Observer | None = None,
        publish: Callable[[], Awaitable[None]] = _tell_nobody,
        end_streams: EndStreams = end_nothing,
        replaced_streams_s: float = 300.0,
        memory_budget_bytes: Mapping[str, int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make a fleet without models.

        Args:
            build: makes a model's engine, on a thread of its own; raises ModelLoadError with a message for clients.
            make_queue: starts the threads that run engines, which the queue owns from then on.
            build_at_once: does what `build` does for `load`, which need not wait for the engine that stays.
            build_next: makes the engine that a model's `next_engine` names; raises as `build`.
            default: the name that an empty name stands for; empty for the first model's.
            observer: told of every change of a model's state.
            publish: awaited after every change: whatever shows the states to clients.
            end_streams: ends the streams of a model that serves no longer, with an error.
            replaced_streams_s: how long streams may go on with a model that was replaced, in seconds.
            memory_budget_bytes: what models may take, by device; none for the others.
            clock: tells the time in seconds.
        """
        self._build = build
        self._make_queue = make_queue
        self._build_at_once = build_at_once or build
        self._build_next = build_next or build
        self._default = default
        self._observer = observer or Observer()
        self._publish = publish
        self._statuses: dict[str, ModelStatus] = {}
        self._builds = Builds()
        self._tasks: set[asyncio.Task[None]] = set()
        self._generations = Counter[str]()
        self._uses = Uses(end_streams, replaced_streams_s, clock)
        self.idle = IdleModels(self, self._uses, memory_budget_bytes or {})
        self._closed = False

    def __iter__(self) -> Iterator[ModelStatus]:
        """The status of every model, in order: a snapshot."""
        return iter(tuple(self._statuses.values()))

    @property
    def default(self) -> str:
        """The name that an empty name stands for; empty if there is no model."""
        return self._default or next((status.name for status in self), "")

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

    def arrange(self, models: Sequence[ModelConfig], *, routed: Container[str] | None = None) -> None:
        """Take over from a configuration what takes no loading: the models' order, and which requests versions get.

        Args:
            models: of the configuration.
            routed: names of the models whose requests are to go as it says; None for all.
        """
        for model in models:
            status = self._statuses.get(model.key)
            if status is not None and (routed is None or model.name in routed):
                self._statuses[model.key] = replace(status, config=status.config.routed_as(model))
        # Of a version that could not be replaced, the place is that of the others of its name.
        names, keys = [model.name for model in models], [model.key for model in models]
        places = {name: names.index(name) for name in names} | {key: keys.index(key) for key in keys}
        ordered = sorted(self, key=lambda one: places.get(one.key, places.get(one.name, len(models))))
        self._statuses = {status.key: status for status in ordered}

    def get(self, name: str, version: str = "", point: Point = at_the_start) -> ServedModel:
        """The ready model for a request.

        Args:
            name: of the model; empty for the default one.
            version: of the model; empty for the one that its weights and `point` say, or the default one.
            point: where the request lies; see `versions.choose`.

        Raises:
            ModelNotFound: there is none.
            ModelLoading: not yet.
            ModelFailed: it could not be loaded.
            ModelInterrupted: it served, and cannot for now.
        """
        status = choose(self, name or self.default, version, point)
        if status.outage is not None:
            raise status.outage.with_traceback(None)
        if status.served is not None:
            return status.served
        if status.state is ModelState.FAILED:
            raise ModelFailed(status.name, status.message)
        raise ModelLoading(f"model {status.name!r} is loading", metadata={"model": status.name}, retry_after_s=_RETRY_S)

    @contextlib.contextmanager
    def use(self, name: str, version: str = "", point: Point = at_the_start) -> Iterator[ServedModel]:
        """`get` for one call: the model finishes it even if it is replaced meanwhile.

        Raises:
            HeatlensError: as `get`.
        """
        with self._uses.of(self.get(name, version, point)) as model:
            yield model

    # Loading.

    def load(self, config: ModelConfig) -> "asyncio.Task[None]":
        """Begin to load a model, which is LOADING from now on.

        Returns:
            A task that ends once the model is READY, FAILED or unloaded, and raises nothing.

        Raises:
            ConfigError: there is a model of that name and version, and it has not FAILED.
            ServerDraining: the fleet is closed.
        """
        self._check_open()
        status = self._statuses.get(config.key)
        if status is not None and status.state is not ModelState.FAILED:
            raise ConfigError(f"there is a model {config.key!r} already")
        self._change(config.key, ModelStatus(config))
        return self._start(self._load(config, self._builds.start(config.key, config, self._build_at_once)))

    async def replace(self, config: ModelConfig, *, key: str = "") -> None:
        """Load a model beside another of the same name, and let it serve in its place once it is ready.

        Calls that began with the old model are finished by it. If the new one cannot be loaded, the old one goes on.

        Args:
            config: the new one.
            key: of the old one; empty for the same version, or for the only one that there is.

        Raises:
            ConfigError: the model is being loaded or replaced.
            ModelNotFound: there is no model of that name.
            ModelLoadError: the new one cannot be loaded; the message may be shown to clients.
            ModelUnloaded: the model was unloaded meanwhile.
            ServerDraining: the fleet is closed.
        """
        self._check_open()
        key = key or (config.key if config.key in self._statuses else find(self, config.name, "").key)
        before = self._statuses[key]
        followed = key in self._builds and bool(before.next_engine)
        if followed:
            # What was to follow is of the old one.
            self._builds.give_up(key, ModelUnloaded(config.name, "is replaced"))
        elif key in self._builds:
            raise ConfigError(f"the model {key!r} is being loaded or replaced")
        try:
            status = await self._ready(key, config, self._builds.start(key, config, self._build))
        except ModelLoadError as error:
            _log.error("model %s is not replaced: %s", key, with_causes(error), exc_info=fault_of(error))
            if followed:
                self._start(self._follow(key, self._builds.start(key, before.config, self._build_next)))
            raise
        old = self._statuses[key].served
        self._serve(key, status)
        if old is not None:
            self._uses.supersede(old)
        await self._publish()

    async def unload(self, name: str, version: str = "") -> None:
        """Take a model out of the fleet, and close it; one that is being loaded is closed once it is.

        Returns when the batch that runs is finished and the engine is closed, or when the batch hangs; of a version
        beside which another answers, at once.

        Raises:
            ModelNotFound: there is none of that name and version.
            ModelChangeRefused: there are several versions, and none is named.
        """
        status = find(self, name, version)
        error = ModelUnloaded(name, "was unloaded")
        self._builds.give_up(status.key, error)
        self._change(status.key, None)
        closing = None
        if status.served is not None and any(one.name == name and one.can_answer for one in self):
            self._uses.supersede(status.served)
        elif status.served is not None:
            self._uses.end_streams(status.served, error)
            closing = self._uses.retire(status.served, error)
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
        if self._statuses.get(status.key) is not status or status.served is None:
            return
        state = ModelState.READY if outage is None else ModelState.UNAVAILABLE
        told = "" if outage is None else outage.message
        self._change(status.key, replace(status, state=state, message=told, outage=outage), message)
        if outage is not None:
            self._uses.end_streams(status.served, outage)
        await self._publish()

    # What `idle` does.

    def may_rest(self, status: ModelStatus) -> bool:
        """Whether a model is READY, stays as it is, and has no call and no stream."""
        is_ready = status.state is ModelState.READY and self._statuses.get(status.key) is status
        no_build = is_ready and status.key not in self._builds
        return no_build and status.served is not None and self._uses.idle_s(status.served) is not None

    async def rest(self, status: ModelStatus, why: str) -> None:
        """Unload a model that may rest: it is IDLE from now on. Returns when its engine is closed."""
        assert status.served is not None
        self._change(status.key, status.at_rest(), why)
        closing = self._uses.retire(status.served, ModelUnloaded(status.name, "was unloaded", retry_after_s=0.0))
        await self._publish()
        await asyncio.shield(closing)

    async def restore(self, key: str) -> None:
        """Load a model that is IDLE again.

        Raises:
            ModelLoadError: it cannot be loaded; it stays IDLE, and says why.
            ModelUnloaded, ServerDraining: it was given up.
        """
        self._check_open()
        config = self._statuses[key].config
        try:
            status = await self._ready(key, config, self._builds.start(key, config, self._build_at_once))
        except ModelLoadError as error:
            self._statuses[key] = replace(self._statuses[key], message=str(error))
            raise
        self._serve(key, replace(status, config=self._statuses[key].config))
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
        return [*serving, *(model.queue for model in self._uses.retired)]

    def _check_open(self) -> None:
        if self._closed:
            raise ServerDraining

    def _start(self, work: Coroutine[object, object, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _change(
        self, key: str, status: ModelStatus | None, message: str = "", *, fault: Exception | None = None
    ) -> None:
        """The only place where a model's state changes: None takes it out, another version's status has its place."""
        about = status or self._statuses[key]
        if status is None:
            del self._statuses[key]
        elif status.key == key:
            self._statuses[key] = status
        else:
            self._statuses = {one.key: one for one in (status if old.key == key else old for old in self)}
        state = "unloaded" if status is None else status.state.value
        self._observer.model_changed(
            model=about.name, version=about.config.version, state=state, message=message, fault=fault
        )

    def _serve(self, key: str, status: ModelStatus) -> None:
        assert status.served is not None
        engine = status.served.capabilities
        devices = ", ".join(device.name for device in status.served.queue.devices)
        how = f"{engine.engine_name} on {devices} in {engine.precision}, layer {engine.layers[0]}"
        if status.next_engine:
            how += f"; {status.next_engine} takes over once the model is exported"
        self._change(key, status, how)
        if status.next_engine and not self._closed:
            self._start(self._follow(status.key, self._builds.start(status.key, status.config, self._build_next)))

    async def _follow(self, key: str, build: "asyncio.Future[BuiltModel]") -> None:
        """Let the engine that was to follow take over. Calls and streams that began before are finished as they are."""
        try:
            status = await self._ready(key, self._statuses[key].config, build)
        except (ModelUnloaded, ServerDraining):
            return
        except ModelLoadError as error:
            serving = self._statuses[key]
            why = with_causes(error)
            _log.warning(
                "model %s is run by torch, not by %s: %s", key, serving.next_engine, why, exc_info=fault_of(error)
            )
            self._statuses[key] = replace(serving, next_engine="")
            return
        before = self._statuses[key]
        self._serve(key, replace(status, config=before.config))
        if before.served is not None:
            self._uses.retire(before.served, ModelUnloaded.by_another(before.name))
        await self._publish()

    async def _load(self, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> None:
        await self._publish()
        key = config.key
        try:
            status = await self._ready(key, config, build)
        except (ModelUnloaded, ServerDraining):
            return
        except asyncio.CancelledError:
            loading = self._statuses.get(key)
            if loading is not None and loading.state is ModelState.LOADING:
                message = "its loading was cancelled"
                self._change(key, replace(loading, state=ModelState.FAILED, message=message), message)
            raise
        except ModelLoadError as error:
            failed = replace(self._statuses[key], state=ModelState.FAILED, message=str(error))
            self._change(key, failed, with_causes(error), fault=fault_of(error))
        else:
            self._serve(key, replace(status, config=self._statuses[key].config))
        await self._publish()

    async def _ready(self, key: str, config: ModelConfig, build: "asyncio.Future[BuiltModel]") -> ModelStatus:
        """Wait for a build, and make what serves of it.

        Raises:
            ModelLoadError: whatever went wrong.
            ModelUnloaded, ServerDraining: it was given up.
        """
        built = await self._builds.wait(key, config, build)
        try:
            queue = self._make_queue(config, built.engines)
        except Exception as error:
            close_aside(built)
            raise UnexpectedLoadError from error
        self._generations[config.name] += 1
        self._uses.begin(queue)
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
