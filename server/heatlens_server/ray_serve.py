"""The services on a Ray cluster, by Ray Serve and its gRPC proxy: the same contract, spread over replicas.

A replica is a whole server on a socket of its own, to which it passes on the calls that Ray's proxy brings: so it has
the queue, batches, limits, errors, log and metrics of a server, and Ray spreads calls, scales and replaces replicas.
This stands on top of all rooms, as `app` does, since it starts servers.
"""

import math
import tempfile
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, gRPCOptions

from heatlens.v1 import explain_pb2, explain_pb2_grpc, model_pb2, model_pb2_grpc
from heatlens_server.app import Server
from heatlens_server.config import AdminConfig, Config, MetricsConfig, load_config
from heatlens_server.core.errors import ConfigError
from heatlens_server.fleet.served_model import ModelState
from heatlens_server.telemetry.logs import configure_logging

Response = TypeVar("Response")

SERVICES = (
    "heatlens.v1.explain_pb2_grpc.add_ExplainServiceServicer_to_server",
    "heatlens.v1.model_pb2_grpc.add_ModelServiceServicer_to_server",
)
"""What Ray's proxies serve, by what registers it."""

_PASSED_ON = frozenset({"authorization", "x-request-id", "traceparent", "tracestate"})
"""The metadata of a call that its replica needs."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How an application is spread over a cluster.

    Attributes:
        replicas: how many; with `max_replicas`, at least so many.
        max_replicas: at most so many, by load; 0: always `replicas`.
        target_ongoing_requests: calls and streams that one replica should have at a time, where `max_replicas` is set.
        target_queue_length: images that should wait in one replica's queues at a time; there are more replicas only
            where more wait then. 0: images do not count.
        look_back_period_s: over which load is averaged, in seconds.
        upscale_delay_s: how long there must be too few replicas before there are more, in seconds.
        downscale_delay_s: how long there must be too many before there are fewer, in seconds.
        max_ongoing_requests: calls and streams that one replica has at most; others wait in Ray's proxies.
        max_queued_requests: that may wait so; more are refused with RESOURCE_EXHAUSTED.
        num_cpus: of each replica. It runs so many threads.
        num_gpus: of each replica.
        models_per_replica: how many models a replica tells Ray that it holds, those called last: calls that name one of
            them in the metadata `multiplexed_model_id` come to it. 0: none, and calls go to any replica.
    """

    replicas: int = 1
    max_replicas: int = 0
    target_ongoing_requests: float = 8.0
    target_queue_length: float = 0.0
    look_back_period_s: float = 30.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    max_ongoing_requests: int = 64
    max_queued_requests: int = 256
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    models_per_replica: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            # Ray takes -1 of these for any number.
            if field.name != "max_queued_requests" and getattr(self, field.name) < 0:
                raise ConfigError(f"{field.name}: is less than 0")
        if 0 < self.max_replicas < self.replicas:
            raise ConfigError("max_replicas: is less than replicas")
        if self.target_queue_length and not self.max_replicas:
            raise ConfigError("target_queue_length: needs max_replicas")


_WANTED = "wanted_replicas"

_ANSWERS = frozenset({ModelState.READY, ModelState.IDLE, ModelState.LOADING})
"""States in which a model answers, or will."""


class StreamEnded(Exception):
    """A stream has ended with a status, which its caller gets from the context."""


class Replica:
    """Answers the calls of Ray's proxies. Its methods have the names that the contract has."""

    def __init__(self, config: Config, scale: Scale = Scale()) -> None:
        """Serve the models of `config` on a socket in place of its address; without TLS, metrics and administrators."""
        self._config = config
        self._scale = scale
        self._server: Server | None = None
        self._tell_ray = serve.multiplexed(_itself, max_num_models_per_replica=scale.models_per_replica or -1)

    async def check_health(self) -> None:
        """Start the server, the first time; Ray calls this before it sends calls here, and every few seconds.

        Raises:
            RuntimeError: no model can answer. Ray starts another replica then.
        """
        if self._server is None:
            await self._start()
        assert self._server is not None
        if not any(model.state in _ANSWERS for model in self._server.fleet):
            raise RuntimeError(f"no model can answer: {self._server.status}")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `by_queue_length` goes by: how many replicas the images that wait in this one's queues ask for."""
        served = [] if self._server is None else [model.served for model in self._server.fleet]
        waiting = sum(len(model.queue.batcher) for model in served if model is not None)
        return {_WANTED: waiting / (self._scale.target_queue_length or 1.0)}

    async def _start(self) -> None:
        section = self._config.server
        configure_logging(log_format=section.log_format, level=section.log_level)
        self._folder = tempfile.TemporaryDirectory(prefix="heatlens-")
        address = f"unix:{Path(self._folder.name) / 'socket'}"
        changed = section.model_copy(update={"listen": address, "tls": None, "max_calls_per_connection": 10_000})
        # Replicas of one node cannot share a port for their metrics.
        others = {"admin": AdminConfig(), "metrics": MetricsConfig()}
        self._server = await Server.start(self._config.model_copy(update={"server": changed, **others}))
        await self._server.wait_loaded()
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self._channel = grpc.aio.insecure_channel(address, unlimited)
        self._explain = explain_pb2_grpc.ExplainServiceStub(self._channel)
        self._models = model_pb2_grpc.ModelServiceStub(self._channel)

    async def __del__(self) -> None:
        """Drain: Ray has let the calls in flight finish."""
        if self._server is not None:
            await self._channel.close()
            await self._server.drain(0.0)
            self._folder.cleanup()

    async def Explain(  # noqa: N802 - the contract's name
        self,
        request: explain_pb2.ExplainRequest,
        grpc_context: Any,  # noqa: ANN401 - Ray's
    ) -> explain_pb2.ExplainResponse:
        """Explain one image."""
        await self._tell(request.model)
        call = self._explain.Explain(request, metadata=_passed_on(grpc_context))
        return await _answer(call, grpc_context, explain_pb2.ExplainResponse())

    async def StreamExplain(  # noqa: N802 - the contract's name
        self,
        requests: AsyncIterator[explain_pb2.StreamExplainRequest],
        grpc_context: Any,  # noqa: ANN401 - Ray's
    ) -> AsyncIterator[explain_pb2.StreamExplainResponse]:
        """Explain the frames of a stream."""
        await self._tell("")
        call = self._explain.StreamExplain(requests, metadata=_passed_on(grpc_context))
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            _refuse(grpc_context, error)
            # A stream that ends without an exception ends well for Ray, whatever its context says.
            raise StreamEnded(error.code().name) from None
        finally:
            call.cancel()

    async def _tell(self, named: str) -> None:
        """Tell Ray which model a call is for, so that others for it come to this replica, which has it then."""
        model = serve.get_multiplexed_model_id() or named
        if self._scale.models_per_replica and any(model == one.name for one in self._config.models):
            await self._tell_ray(model)

    async def ListModels(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.ListModelsRequest,
        grpc_context: Any,  # noqa: ANN401 - Ray's
    ) -> model_pb2.ListModelsResponse:
        """List the models, as this replica has them."""
        call = self._models.ListModels(request, metadata=_passed_on(grpc_context))
        return await _answer(call, grpc_context, model_pb2.ListModelsResponse())

    async def GetServerInfo(  # noqa: N802 - the contract's name
        self,
        request: model_pb2.GetServerInfoRequest,
        grpc_context: Any,  # noqa: ANN401 - Ray's
    ) -> model_pb2.GetServerInfoResponse:
        """Return the version and the limits, which are those of one replica."""
        call = self._models.GetServerInfo(request, metadata=_passed_on(grpc_context))
        return await _answer(call, grpc_context, model_pb2.GetServerInfoResponse())


async def _itself(model: str) -> str:
    """In the place of what loads a model, for Ray: the fleet loads and unloads models."""
    return model


def _passed_on(grpc_context: Any) -> tuple[tuple[str, str], ...]:  # noqa: ANN401 - Ray's
    return tuple((key, value) for key, value in grpc_context.invocation_metadata() if key in _PASSED_ON)


async def _answer(call: Any, grpc_context: Any, empty: Response) -> Response:  # noqa: ANN401 - gRPC's, Ray's
    """The server's answer; where it refuses, Ray's proxy sends what it said, and nothing of `empty`."""
    try:
        response: Response = await call
    except grpc.aio.AioRpcError as error:
        _refuse(grpc_context, error)
        # Not raised: Ray would log a traceback for each.
        return empty
    return response


def _refuse(grpc_context: Any, error: grpc.aio.AioRpcError) -> None:  # noqa: ANN401 - Ray's
    grpc_context.set_code(error.code())
    grpc_context.set_details(error.details() or error.code().name)
    grpc_context.set_trailing_metadata([(key, value) for key, value in error.trailing_metadata() or ()])


def by_queue_length(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas there should be: Ray's policy where `Scale.target_queue_length` is set.

    More, if so many more images wait than should. Fewer, if the open calls would fit, too: a queue that is empty does
    not say how busy its device is.
    """
    wanted = (context.aggregated_metrics or {}).get(_WANTED)
    if not wanted:  # no replica has told yet
        return context.target_num_replicas, {}
    assert context.config is not None
    by_calls = context.total_num_requests / context.config.get_target_ongoing_requests()
    return math.ceil(max(sum(wanted.values()), min(context.target_num_replicas, by_calls))), {}


def application(config: Config, scale: Scale) -> serve.Application:
    """The application of a configuration, for `serve.run`."""
    by_queue = {"policy_function": by_queue_length} if scale.target_queue_length else {}
    autoscaling = (
        AutoscalingConfig(
            min_replicas=scale.replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=scale.target_ongoing_requests,
            look_back_period_s=scale.look_back_period_s,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            policy=AutoscalingPolicy(**by_queue),  # type: ignore[no-untyped-call]
        )
        if scale.max_replicas
        else None
    )
    deployment = serve.deployment(
        num_replicas=None if autoscaling else scale.replicas,
        autoscaling_config=autoscaling,
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=scale.max_queued_requests,
        graceful_shutdown_timeout_s=config.server.grace_s,
        ray_actor_options={"num_cpus": scale.num_cpus, "num_gpus": scale.num_gpus},
    )(Replica)
    bound: serve.Application = deployment.bind(config, scale)
    return bound


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """The builder for Serve's own configuration files: `import_path: heatlens_server.ray_serve:app`.

    Args:
        arguments: `config`, the path of a TOML file on the head node (HEATLENS_* variables as well), and the fields of
            `Scale`.

    Raises:
        ConfigError: the configuration or an argument is wrong.
    """
    kinds: dict[str, Any] = {field.name: type(getattr(Scale(), field.name)) for field in fields(Scale)}
    given = {name: value for name, value in arguments.items() if name != "config"}
    if unknown := sorted(given.keys() - kinds.keys()):
        raise ConfigError(f"args: unknown: {', '.join(unknown)}; known: config, {', '.join(kinds)}")
    for name, value in given.items():
        try:
            # As text, which all are on the command line of `serve run`; and int(2.5) is 2.
            given[name] = kinds[name](str(value))
        except ValueError:
            raise ConfigError(f"args: {name}: expected {kinds[name].__name__}, got {value!r}") from None
    path = arguments.get("config")
    return application(load_config(None if path is None else Path(path)), Scale(**given))


def start(config: Config, scale: Scale, *, address: str | None, port: int, name: str) -> None:
    """Serve a configuration on a cluster, in the place of what has that name, and return once it answers.

    What had the name goes on answering until what replaces it is ready.

    Args:
        config: what to serve.
        scale: how it is spread.
        address: of the cluster, or "auto"; None: start one here.
        port: of the gRPC proxy on every node.
        name: of the application.

    Raises:
        RuntimeError: no replica became ready.
        ConnectionError: there is no such cluster.
    """
    ray.init(address=address, ignore_reinit_error=True, include_dashboard=False if address is None else None)
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": "127.0.0.1"},
        grpc_options=gRPCOptions(port=port, grpc_servicer_functions=list(SERVICES)),
    )
    serve.run(application(config, scale), name=name)


def stop(name: str) -> None:
    """End an application, once its calls are finished, and leave the cluster; one that `start` started ends with it."""
    serve.delete(name)
    ray.shutdown()
