"""Wiring, and the life cycle of a server: bind, load, serve, drain."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens.v1 import explain_pb2_grpc, model_pb2_grpc
from heatlens_server.allocator import return_freed_memory, return_memory_when_idle
from heatlens_server.api.admission import Admission
from heatlens_server.api.calls import Administrators, CallGate
from heatlens_server.api.checks import Limits
from heatlens_server.api.explainer import Explainer
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.config import AdminConfig, Config, ModelConfig, ServerConfig
from heatlens_server.core.cores import usable_cores
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import ConfigError, ServerDraining
from heatlens_server.core.events import Observer, Observers
from heatlens_server.core.peers import host_of
from heatlens_server.ending import LastResort, ModelHangs, handle_signals
from heatlens_server.file_descriptors import connections_within_limit
from heatlens_server.fleet.build import build, build_export
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.fleet.idle import watch_idle
from heatlens_server.fleet.isolated_engine import build_isolated
from heatlens_server.fleet.outages import watch
from heatlens_server.fleet.reload import Reloader
from heatlens_server.fleet.served_model import ModelState, batch_size_of
from heatlens_server.fleet.warm_up import try_out
from heatlens_server.scheduling.large_images import LargeImages
from heatlens_server.scheduling.model_queue import ModelQueue
from heatlens_server.service_manager import ServiceManager
from heatlens_server.telemetry.log_observer import LogObserver
from heatlens_server.telemetry.statistics import Statistics
from heatlens_server.transports.grpc.connections import watch_connections
from heatlens_server.transports.grpc.hang_up import hang_up
from heatlens_server.transports.grpc.refusals import Refusals
from heatlens_server.transports.grpc.server import Health, bind, enable_reflection, make_server
from heatlens_server.transports.grpc.services import ExplainServicer, ModelServicer
from heatlens_server.transports.grpc.traffic import Traffic
from heatlens_server.transports.grpc.v2.service import InferenceService

if TYPE_CHECKING:
    from heatlens_server.telemetry.metrics import Metrics
    from heatlens_server.telemetry.tracing import Tracing
    from heatlens_server.transports.http.server import MetricsServer

_log = logging.getLogger("heatlens")

_REFUSE_WINDOW_S = 0.1
"""How long a draining server with nothing in flight still answers new callers with UNAVAILABLE, in seconds."""

_FLUSH_S = 1.0
"""How long answers that are on their way out, and health watchers, have once every call is done, in seconds."""

_GIVE_UP_S = 0.5
"""How long calls that outlived the grace have to hear why they are given up: those that wait, then those that run; in
seconds."""

_SEND_S = 1.0
"""How long the last spans may take to be sent, in seconds."""

_LARGE_NICENESS = 10
"""Of threads that decode large images: while small images, models and calls want a core, they get a tenth of it."""

_CLOSE_S = 2.0
"""How long engines may take to end once no call is left, in seconds."""


class Server:
    """A running server. Made by `start`, on the event loop that it serves on.

    Attributes:
        fleet: its models.
        explainer: explains images with them.
        streams: its open streams.
        reloader: changes them as the configuration says by then.
        hung: set once a model has begun to hang.
        port: bound.
    """

    def __init__(self, config: Config, read: Callable[[], Config] | None = None) -> None:
        """Wire everything; nothing runs yet. Arguments: as `serve`."""
        self._config = config
        self._decoder_count = config.server.decode_threads or usable_cores()
        self._decoders = ThreadPoolExecutor(self._decoder_count, thread_name_prefix="decode-image")
        self._large_decoders = ThreadPoolExecutor(
            self._decoder_count, thread_name_prefix="decode-large", initializer=_yield_to_others
        )
        self._large_images = LargeImages(
            self._large_decoders, at_once=self._decoder_count, max_bytes=config.server.max_decoding_bytes
        )
        limits = Limits(
            max_message_bytes=config.server.max_message_bytes,
            max_image_pixels=config.server.max_image_pixels,
            max_queue_length=config.server.max_queue_length,
            max_targets=config.server.max_targets,
            max_streams=config.server.max_streams,
            max_in_flight=config.server.max_in_flight,
            max_decoding_bytes=config.server.max_decoding_bytes,
            max_bytes_in_flight=config.server.max_bytes_in_flight,
            max_connection_bytes_in_flight=config.server.max_connection_bytes_in_flight,
            max_model_runs=config.server.max_model_runs,
        )
        self._host_of = host_of if config.server.share_by_host else _everybody
        self.streams = OpenStreams(max_streams=limits.max_streams, host_of=self._host_of)
        self._health = Health()
        statistics = Statistics()
        observers: list[Observer] = [LogObserver(ok_share=config.server.log_ok_share)]
        if config.server.v2:
            observers.append(statistics)
        self._metrics = _make_metrics() if config.metrics.listen else None
        if self._metrics is not None:
            observers.append(self._metrics)
        self._tracing = _make_tracing() if config.tracing.enabled else None
        if self._tracing is not None:
            observers.append(self._tracing)
        self._metrics_server: MetricsServer | None = None
        self._observer: Observer = Observers(observers)
        self.fleet = Fleet(
            build=functools.partial(_build, config.server, self._observer, build),
            build_at_once=functools.partial(_build, config.server, self._observer, _build_at_once),
            build_next=functools.partial(_build, config.server, self._observer, build_export),
            make_queue=self._make_queue,
            default=config.server.default_model,
            observer=self._observer,
            publish=lambda: self._health.update(self.fleet),
            end_streams=self.streams.end_streams_of,
            replaced_streams_s=config.server.replaced_streams_s,
            memory_budget_bytes=config.server.memory_budget_bytes,
        )
        self._loading: list[asyncio.Task[None]] = []
        self.hung = asyncio.Event()
        self._background: list[asyncio.Task[None]] = []
        token = config.server.read_token()
        admission = Admission(
            max_bytes=limits.max_bytes_in_flight,
            max_peer_bytes=limits.max_connection_bytes_in_flight,
            max_message_bytes=limits.max_message_bytes,
            receive_timeout_s=config.server.receive_timeout_s,
            send_timeout_s=config.server.send_timeout_s,
            hang_up=hang_up,
            host_of=self._host_of,
        )
        self._gate = CallGate(
            self._observer,
            token=None if token is None else token.get_secret_value(),
            admission=admission,
            administrators=_administrators(config.admin) if config.admin.enabled else None,
        )
        self._max_connections = connections_within_limit(config.server.max_connections)
        self.explainer = explainer = Explainer(self.fleet, limits, self._observer, admission)
        self._traffic = Traffic(limits.max_message_bytes)
        self._grpc = make_server(
            config.server,
            self._gate,
            max_connections=self._max_connections,
            refuse_if_full=explainer.refuse_if_full,
            traffic=self._traffic,
            refusals=Refusals(host_of if config.server.share_by_host else str),
        )
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(ExplainServicer(explainer, self.streams), self._grpc)
        self.reloader = Reloader(self.fleet, config, read or (lambda: config))
        model_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.fleet, limits, self.reloader), self._grpc)
        if config.server.v2:
            InferenceService(explainer, self.streams, self.reloader, statistics).add_to(self._grpc)
        self._health.add_to(self._grpc)
        if config.server.reflection:
            enable_reflection(self._grpc, v2=config.server.v2)
        self.port = 0

    @classmethod
    async def start(cls, config: Config, read: Callable[[], Config] | None = None) -> "Server":
        """Bind, answer, and load the models meanwhile. Arguments: as `serve`.

        Raises:
            ConfigError: the address cannot be bound, or a file of the configuration cannot be read.
        """
        server = cls(config, read)
        server.port = bind(server._grpc, config.server)
        server._serve_metrics()
        server.load()
        server._background = [
            asyncio.create_task(watch(server.fleet, on_hang=lambda _name: server.hung.set())),
            asyncio.create_task(watch_idle(server.fleet)),
            asyncio.create_task(return_memory_when_idle(server._gate.work)),
            asyncio.create_task(
                watch_connections(
                    server.port,
                    server._traffic,
                    max_connections=server._max_connections,
                    host_of=host_of if config.server.share_by_host else None,
                    refuses_floods=config.server.refuse_floods,
                )
            ),
        ]
        await server._health.update(server.fleet)
        await server._grpc.start()
        _log.info("listening on %s, port %d", config.server.listen, server.port)
        return server

    def load(self) -> None:
        """Begin to load the models of the configuration."""
        self._loading = [self.fleet.load(model) for model in self._config.models]

    async def wait_loaded(self) -> None:
        """Wait until every model of the configuration is ready or has failed."""
        await asyncio.gather(*self._loading)

    async def drain(self, grace_s: float, *, hurry: asyncio.Event | None = None) -> bool:
        """Health NOT_SERVING, refuse new calls, finish those in flight, give them up after the grace. Idempotent.

        Streams read no more frames, answer those that run, and end. After the grace, what waits or is between two steps
        is answered SERVER_DRAINING, and a moment later so are calls whose batch still runs.

        Args:
            grace_s: how long calls in flight may take, in seconds.
            hurry: ends the grace, and that moment, when it is set.

        Returns:
            False if a model is still being loaded or run, or a large image decoded, on a thread, which cannot be
            interrupted.
        """
        _log.info("draining: calls in flight have %g s", grace_s)
        await self._health.drain()
        self.fleet.stop_loading()
        # As long as calls are in flight the port stays open, and new callers are told UNAVAILABLE. Closing it right
        # away would cut off new callers, whom gRPC tells CANCELLED.
        deadline = time.monotonic() + grace_s
        self.streams.drain()
        finished = await self._gate.close(grace_s, hurry=hurry)
        if not finished:
            self.fleet.give_up(ServerDraining())
            finished = await self._gate.close(_GIVE_UP_S, hurry=hurry)
        if not finished:
            self.fleet.give_up(ServerDraining(), running=True)
            finished = await self._gate.close(_GIVE_UP_S)
        await asyncio.sleep(min(_REFUSE_WINDOW_S, max(0.0, deadline - time.monotonic())))
        await self._grpc.stop(_FLUSH_S if finished else 0.0)
        for decoders in (self._decoders, self._large_decoders):
            decoders.shutdown(wait=False, cancel_futures=True)
        for task in self._background:
            task.cancel()
        closed = await self.fleet.close(timeout_s=_CLOSE_S)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)
        if self._tracing is not None:
            # A collector that does not answer must not keep the process.
            sending = threading.Thread(target=self._tracing.close, name="send-spans", daemon=True)
            sending.start()
            await asyncio.to_thread(sending.join, _SEND_S)
        _log.info("stopped")
        return closed and not self._large_images.busy

    @property
    def status(self) -> str:
        """How many of its models are ready, as a sentence."""
        states = [model.state for model in self.fleet]
        return f"{states.count(ModelState.READY)} of {len(states)} models are ready"

    @property
    def metrics_port(self) -> int:
        """The bound port of /metrics, /live and /ready; 0 if that is off."""
        return 0 if self._metrics_server is None else self._metrics_server.port

    def _serve_metrics(self) -> None:
        """Serve /metrics, if it is on.

        Raises:
            ConfigError: the address cannot be bound.
        """
        if self._metrics is None:
            return
        from heatlens_server.transports.http.server import MetricsServer  # noqa: PLC0415 - as `_make_metrics`
        from heatlens_server.transports.http.state import StateCollector  # noqa: PLC0415

        listen = self._config.metrics.listen
        self._metrics.registry.register(StateCollector(self.fleet, self.streams, self._gate))
        self._metrics_server = MetricsServer(
            listen, self._metrics.registry, {"/live": lambda: True, "/ready": lambda: self._health.ready}
        )
        _log.info("metrics on %s, port %d", listen, self.metrics_port)

    def _make_queue(self, config: ModelConfig, engines: Sequence[SteppingEngine]) -> ModelQueue:
        return ModelQueue(
            engines,
            name=config.name,
            decoders=self._decoders,
            max_decoding=self._decoder_count,
            large_images=self._large_images,
            max_batch_size=batch_size_of(config, engines[0].info),
            max_delay_s=config.batching.max_delay_ms / 1e3,
            max_queue_length=self._config.server.max_queue_length,
            observer=self._observer,
            host_of=self._host_of,
            try_out=try_out,
        )


def _everybody(_peer: str) -> str:
    return ""


def _yield_to_others() -> None:
    """Have this thread run where others leave the processors to it: on Linux each thread has a priority of its own."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LARGE_NICENESS)


def _administrators(admin: AdminConfig) -> Administrators:
    token = admin.read_token()
    return Administrators(None if token is None else token.get_secret_value(), frozenset(admin.client_names))


def _make_metrics() -> "Metrics":
    # Only where it is wanted: prometheus-client takes time to import.
    from heatlens_server.telemetry.metrics import Metrics  # noqa: PLC0415

    return Metrics()


def _make_tracing() -> "Tracing":
    try:
        from heatlens_server.telemetry.tracing import Tracing, otlp_exporter  # noqa: PLC0415 - an extra

        return Tracing(otlp_exporter())
    except ImportError as error:
        message = f"tracing.enabled: this needs {error.name}, which is not installed: pip install 'heatlens[otel]'"
        raise ConfigError(message) from error


# Where memory has a budget, models that come together would take more than it before any of them can go.
_one_at_a_time = threading.Lock()


def _build(
    server: ServerConfig, observer: Observer, make: Callable[..., BuiltModel], config: ModelConfig
) -> BuiltModel:
    started_at = time.monotonic()
    with _one_at_a_time if server.memory_budget_bytes else contextlib.nullcontext():
        if config.isolation == "process":
            built = build_isolated(
                config, cache_dir=server.cache_path, log_format=server.log_format, log_level=server.log_level
            )
        else:
            built = make(config, cache_dir=server.cache_path)
            return_freed_memory()
    observer.model_built(model=config.name, duration_s=time.monotonic() - started_at, cached=built.export_was_cached)
    return built


def _build_at_once(config: ModelConfig, *, cache_dir: Path | None) -> BuiltModel:
    return build(config, cache_dir=cache_dir, at_once=not config.wait_for_export)


async def serve(
    config: Config,
    *,
    on_start: Callable[[Server], None] = lambda _server: None,
    read: Callable[[], Config] | None = None,
) -> bool:
    """Serve until SIGTERM or SIGINT, then drain within the configured grace; a second signal ends the grace.

    From the first signal on the process ends within the grace and `ending.END_S`, whatever runs. SIGHUP reloads the
    configuration.

    Args:
        config: what to serve.
        on_start: called once the port is bound.
        read: reads the configuration again, and raises ConfigError; None: it stays as it is.

    Returns:
        What `Server.drain` returns.

    Raises:
        ModelHangs: the server has ended because a model hangs.
    """
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    last_resort = LastResort(config.server.grace_s)

    def end() -> None:
        (hurry if stop.is_set() else stop).set()

    def wake() -> None:
        # What a second signal would tell a loop that is closed, nobody needs to hear.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(end)

    handle_signals(wake, last_resort)
    manager = ServiceManager(os.environ)
    alive = asyncio.create_task(manager.show_life())
    server = await Server.start(config, read)

    async def load() -> None:
        await server.wait_loaded()
        manager.ready(server.status)

    async def reload() -> None:
        manager.reloading()
        await server.reloader.reload()
        manager.ready(server.status)

    changes = {asyncio.create_task(load())}

    def reload_now() -> None:
        changes.add(task := loop.create_task(reload()))
        task.add_done_callback(changes.discard)

    loop.add_signal_handler(signal.SIGHUP, reload_now)
    on_start(server)
    waits = [asyncio.create_task(stop.wait())]
    if config.server.exit_on_hang:
        waits.append(asyncio.create_task(server.hung.wait()))
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        _log.critical("the server ends, as a model hangs and server.exit_on_hang is set")
        stop.set()
        last_resort.tell()
    loop.remove_signal_handler(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for task in changes:
        task.cancel()
    manager.stopping()
    ended = await server.drain(config.server.grace_s, hurry=hurry)
    alive.cancel()
    last_resort.tell()
    if config.server.exit_on_hang and server.hung.is_set():
        raise ModelHangs
    return ended
