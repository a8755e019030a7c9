"""Wiring and life cycle: bind, load, serve, drain."""

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from heatlens.v1 import explain_pb2_grpc, model_pb2_grpc
from heatlens_server.api.calls import CallGate
from heatlens_server.api.limits import Limits
from heatlens_server.api.stream.open_streams import OpenStreams
from heatlens_server.config import Config, ModelConfig
from heatlens_server.core.errors import ModelLoadError, ServerDraining
from heatlens_server.core.events import Observer, Observers
from heatlens_server.fleet.build import BuiltModel, build
from heatlens_server.fleet.registry import Registry
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue
from heatlens_server.telemetry.log_observer import LogObserver
from heatlens_server.transports.grpc.explain_service import ExplainServicer
from heatlens_server.transports.grpc.health import Health
from heatlens_server.transports.grpc.listener import bind, enable_reflection, make_server
from heatlens_server.transports.grpc.model_service import ModelServicer

_log = logging.getLogger("heatlens")

_NOTICE_S = 0.1
"""How long a draining server with nothing in flight still answers new callers with UNAVAILABLE, in seconds."""

_FLUSH_S = 1.0
"""How long answers that are on their way out, and health watchers, have once every call is done, in seconds."""

_PARTING_S = 0.5
"""How long calls that outlived the grace have to hear why they are given up, in seconds."""

_CLOSE_S = 2.0
"""How long engines may take to end once no call is left, in seconds."""


class Server:
    """A running server. Made by `start`, on the event loop that it serves on."""

    def __init__(self, config: Config) -> None:
        """Wire everything; nothing runs yet."""
        self._config = config
        names = [model.name for model in config.models]
        self.registry: Registry[ServedModel] = Registry(names, default=config.default_model)
        self._health = Health()
        self._loading: set[asyncio.Task[None]] = set()
        self._loaders: list[threading.Thread] = []
        self._preparer_count = config.server.decode_threads or os.cpu_count() or 1
        self._preparers = ThreadPoolExecutor(self._preparer_count, thread_name_prefix="prepare-image")
        self._limits = Limits(
            max_message_bytes=config.server.max_message_bytes,
            max_image_pixels=config.server.max_image_pixels,
            max_queue_length=config.server.max_queue_length,
            max_targets=config.server.max_targets,
            max_streams=config.server.max_streams,
            max_in_flight=config.server.max_in_flight,
        )
        token = config.server.read_token()
        self._observer: Observer = Observers([LogObserver()])
        self._gate = CallGate(self._observer, token=None if token is None else token.get_secret_value())
        self.streams = OpenStreams(max_streams=self._limits.max_streams)
        self._grpc = make_server(config.server, self._gate)
        self.port = 0

    @classmethod
    async def start(cls, config: Config) -> "Server":
        """Bind, answer, and load the models meanwhile.

        Raises:
            ConfigError: the address cannot be bound, or a file of the configuration cannot be read.
        """
        server = cls(config)
        server._add_services()
        server.port = bind(server._grpc, config.server)
        await server._health.update(server.registry.slots)
        await server._grpc.start()
        _log.info("listening on %s, port %d", config.server.listen, server.port)
        for model in config.models:
            task = asyncio.create_task(server._load(model))
            server._loading.add(task)
            task.add_done_callback(server._loading.discard)
        return server

    async def wait_loaded(self) -> None:
        """Wait until every model is ready or has failed."""
        await asyncio.gather(*self._loading)

    async def drain(self, grace_s: float) -> bool:
        """Health NOT_SERVING, refuse new calls, finish those in flight, give them up after the grace. Idempotent.

        Streams read no more frames, answer those that run, and end. After the grace, what waits or is between two steps
        is answered SERVER_DRAINING, and a moment later calls whose batch still runs are cut off.

        Args:
            grace_s: how long calls in flight may take, in seconds.

        Returns:
            False if a model is still being loaded or run on a thread, which cannot be interrupted.
        """
        _log.info("draining: calls in flight have %g s", grace_s)
        await self._health.drain()
        for task in self._loading:
            task.cancel()
        # As long as calls are in flight the port stays open, and new callers are told UNAVAILABLE. Closing it right
        # away would cut off those who have not heard yet: gRPC tells them CANCELLED.
        deadline = time.monotonic() + grace_s
        self.streams.drain()
        finished = await self._gate.close(grace_s)
        queues = [slot.value.queue for slot in self.registry.slots if slot.value is not None]
        if not finished:
            for queue in queues:
                queue.give_up(ServerDraining())
            finished = await self._gate.close(_PARTING_S)
        await asyncio.sleep(min(_NOTICE_S, max(0.0, deadline - time.monotonic())))
        await self._grpc.stop(_FLUSH_S if finished else 0.0)
        self._preparers.shutdown(wait=False, cancel_futures=True)
        closed = await asyncio.gather(*(queue.close(timeout_s=_CLOSE_S) for queue in queues))
        _log.info("stopped")
        return all(closed) and not any(thread.is_alive() for thread in self._loaders)

    def _add_services(self) -> None:
        models = self._config.models
        explain_pb2_grpc.add_ExplainServiceServicer_to_server(
            ExplainServicer(self.registry, self._limits, self.streams), self._grpc
        )
        model_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(
                self.registry,
                self._limits,
                max_batch_size=max(model.batching.max_batch_size for model in models),
                max_delay_s=max(model.batching.max_delay_ms for model in models) / 1e3,
            ),
            self._grpc,
        )
        self._health.add_to(self._grpc)
        if self._config.server.reflection:
            enable_reflection(self._grpc)

    async def _load(self, config: ModelConfig) -> None:
        """Load one model; whatever goes wrong with it stays with it."""
        try:
            built = await self._in_loader(config)
        except ModelLoadError as error:
            _log.error("model %s failed to load: %s", config.name, error)
            self.registry.set_failed(config.name, str(error))
        except Exception:
            _log.exception("model %s failed to load", config.name)
            self.registry.set_failed(config.name, "an unexpected error while loading; the server's log has it")
        else:
            self.registry.set_ready(config.name, self._serve(config, built))
            info = built.engine.info
            _log.info(
                "model %s ready: %s on %s in %s, layer %s",
                config.name,
                info.engine_name,
                info.device,
                info.precision,
                info.layers[0],
            )
        await self._health.update(self.registry.slots)

    async def _in_loader(self, config: ModelConfig) -> BuiltModel:
        """Build in a daemon thread: a download may hang for minutes, and must not keep a draining process alive."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[BuiltModel] = loop.create_future()

        def settle(built: BuiltModel | None, error: Exception | None) -> None:
            if future.done():
                return
            if built is None:
                future.set_exception(error or RuntimeError("nothing was built"))
            else:
                future.set_result(built)

        def run() -> None:
            built, error = None, None
            try:
                built = build(config, cache_dir=self._config.server.cache_path)
            except Exception as raised:
                error = raised
            except BaseException as raised:
                error = ModelLoadError(f"the model's code raised {type(raised).__name__}")
            # After a drain the loop is closed and nobody waits for this model.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, built, error)

        loader = threading.Thread(target=run, name=f"load-{config.name}", daemon=True)
        self._loaders.append(loader)
        loader.start()
        return await future

    def _serve(self, config: ModelConfig, built: BuiltModel) -> ServedModel:
        max_delay_s = config.batching.max_delay_ms / 1e3
        queue = ModelQueue(
            built.engine,
            name=config.name,
            preparers=self._preparers,
            max_preparing=self._preparer_count,
            max_batch_size=config.batching.max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=self._config.server.max_queue_length,
        )
        return ServedModel(
            name=config.name,
            version=built.version,
            labels=built.labels,
            preprocess=built.preprocess,
            capabilities=built.engine.info,
            default_method=built.method,
            max_batch_size=config.batching.max_batch_size,
            max_delay_s=max_delay_s,
            queue=queue,
        )


async def serve(config: Config, *, on_start: Callable[[Server], None] = lambda _server: None) -> bool:
    """Serve until SIGTERM or SIGINT, then drain within the configured grace.

    Args:
        config: what to serve.
        on_start: called once the port is bound.

    Returns:
        What `Server.drain` returns.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    server = await Server.start(config)
    on_start(server)
    await stop.wait()
    return await server.drain(config.server.grace_s)
