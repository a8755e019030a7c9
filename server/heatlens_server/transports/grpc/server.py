"""The gRPC server object: its options, its credentials, its port, and grpc.health.v1.

Health is told for the server as a whole, per service and per model:

* "", "readiness" and each heatlens service: SERVING once no model is loading for the first time and at least one is
  ready, until the server drains.
* "liveness": SERVING as long as the server answers at all, also while it loads and while it drains.
* "heatlens.v1.ExplainService/<model>": SERVING once a version of that model is ready; SERVICE_UNKNOWN once
  all are unloaded.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
from collections.abc import Callable

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from heatlens.v1 import explain_pb2, model_pb2
from heatlens_server.api.calls import CallGate
from heatlens_server.api.models import is_ready, model_states
from heatlens_server.config import ServerConfig, TlsConfig
from heatlens_server.core.errors import ConfigError
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.transports.grpc.interceptor import CallInterceptor
from heatlens_server.transports.grpc.refusals import Refusals
from heatlens_server.transports.grpc.traffic import Traffic
from heatlens_server.transports.grpc.v2 import reflection as v2_reflection
from heatlens_server.transports.grpc.v2.service import FOR_ADMINISTRATORS as INFERENCE_FOR_ADMINISTRATORS

SERVICES = tuple(
    service.full_name
    for file in (explain_pb2.DESCRIPTOR, model_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

EXPLAIN_SERVICE = explain_pb2.DESCRIPTOR.services_by_name["ExplainService"].full_name

_EXPLAINING = (f"/{EXPLAIN_SERVICE}/Explain", f"/{v2_reflection.SERVICE}/ModelInfer")

_FOR_ADMINISTRATORS = frozenset(
    f"/{service}/{method}"
    for service, methods in (
        ("heatlens.v1.ModelService", ("LoadModel", "UnloadModel", "ReloadModel")),
        (v2_reflection.SERVICE, INFERENCE_FOR_ADMINISTRATORS),
    )
    for method in methods
)

LIVENESS, READINESS = "liveness", "readiness"

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

_KEEPALIVE_OPTIONS = (
    # Finds dead peers in about a minute.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Pings of peers are answered, as many as they read the answers of. gRPC would close the connection of one that
    # pings often, and adds an error to those before for each ping until then: 340,000 took 21 s of a core, not 0.05.
    ("grpc.http2.max_ping_strikes", 0),
    # A peer that connects and says nothing, of TLS or of HTTP/2, is gone after this time.
    ("grpc.server_handshake_timeout_ms", 20_000),
)

_NEVER_MS = 2**31 - 1

_LOOKAHEAD_BYTES = 256 * 1024
"""What a peer may send of a call that is not read."""


# gRPC logs metadata that is no UTF-8, with its value, which may be a token, and a traceback; and reads it as Latin-1.
logging.getLogger("grpc._cython.cygrpc").addFilter(lambda record: not str(record.msg).startswith("Invalid encoding on"))


def make_server(
    config: ServerConfig,
    gate: CallGate,
    *,
    max_connections: int,
    refuse_if_full: Callable[[str], None] = lambda _peer: None,
    traffic: Traffic | None = None,
    refusals: Refusals | None = None,
) -> grpc.aio.Server:
    """Make a server with limits, keepalive and the call interceptor, without services and without a port.

    Args:
        config: its limits.
        gate: lets calls in.
        max_connections: most connections at a time: those of the configuration, or as many as there are files for.
        refuse_if_full: refuses requests to explain before their messages are read: see `api.explainer.Explainer`.
        traffic: is told what calls account for; None: nobody asks.
        refusals: see `CallInterceptor`.
    """
    refusing = dict.fromkeys(_EXPLAINING, refuse_if_full)
    return grpc.aio.server(
        interceptors=[
            CallInterceptor(gate, refusing, for_administrators=_FOR_ADMINISTRATORS, traffic=traffic, refusals=refusals)
        ],
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            # With the default of 1, a second server on the same port would start and take half of the connections.
            ("grpc.so_reuseport", 0),
            ("grpc.max_allowed_incoming_connections", max_connections),
            # What a peer opens beyond it, whatever it was told, is reset without a handler.
            ("grpc.max_concurrent_streams", config.max_calls_per_connection),
            # Otherwise a peer may grow each call's window to megabytes, whether or not its message is read. A message
            # that is read gets the window that it needs.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", _LOOKAHEAD_BYTES),
            ("grpc.max_connection_idle_ms", round(config.idle_timeout_s * 1000)),
            # gRPC's grace for the calls on it is endless by default.
            ("grpc.max_connection_age_ms", round(config.max_connection_age_s * 1000) or _NEVER_MS),
            *_KEEPALIVE_OPTIONS,
        ],
    )


def bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Bind the configured address.

    Returns:
        The port, also when the configured one is 0.

    Raises:
        ConfigError: the address cannot be bound, or a TLS file cannot be read.
    """
    if config.listen.startswith("unix:"):
        _check_free(config.listen)
    # The mode of a unix socket is that of its creation: set afterwards, there would be a moment in between.
    umask = os.umask(~int(config.socket_mode, 8) & 0o777)
    try:
        if config.tls is None:
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, _credentials(config.tls))
    except RuntimeError:
        port = 0
    finally:
        os.umask(umask)
    if port == 0:
        raise ConfigError(f"server.listen: cannot listen on {config.listen}: is another server using that port?")
    return port


def _check_free(listen: str) -> None:
    """Refuse a socket that another server answers on: gRPC would take its name away.

    Raises:
        ConfigError: one does.
    """
    with socket.socket(socket.AF_UNIX) as caller, contextlib.suppress(OSError):
        caller.connect(listen.removeprefix("unix:").removeprefix("//"))
        raise ConfigError(f"server.listen: another server listens on {listen}")


def enable_reflection(server: grpc.aio.Server, *, v2: bool) -> None:
    """Let tools such as grpcurl ask for the services, with `v2` also for that of the open inference protocol."""
    names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME, *[v2_reflection.SERVICE] * v2)
    reflection.enable_server_reflection(names, server, v2_reflection.pool() if v2 else None)


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    try:
        key, certificate = tls.private_key.read_bytes(), tls.certificate.read_bytes()
        client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
        # gRPC does not say what is wrong with them.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.private_key)
    except ssl.SSLError as error:
        message = f"are no certificate and its key, in PEM, that belong together: {error.reason or error}"
        raise ConfigError(f"server.tls: certificate and private_key {message}") from None
    except OSError as error:
        raise ConfigError(f"server.tls: cannot read {error.filename}: {error.strerror}") from None
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )


class Health:
    """The health service of a server.

    Attributes:
        ready: what it says of readiness.
    """

    def __init__(self) -> None:
        """Everything is unknown until `update`."""
        self._servicer = health_aio.HealthServicer()
        # One update at a time: else an earlier one could overwrite what a later one says.
        self._updating = asyncio.Lock()
        self._models: set[str] = set()
        self._draining = False
        self.ready = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the service."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def update(self, fleet: Fleet) -> None:
        """Publish the states of the models. Does nothing after `drain`."""
        async with self._updating:
            if self._draining:
                return
            await self._servicer.set(LIVENESS, _SERVING)
            states = model_states(fleet)
            self.ready = is_ready(fleet)
            overall = _SERVING if self.ready else _NOT_SERVING
            for service in ("", READINESS, *SERVICES):
                await self._servicer.set(service, overall)
            for name in self._models - set(states):
                await self._servicer.set(f"{EXPLAIN_SERVICE}/{name}", _UNKNOWN)
            for name, status in states.items():
                told = _SERVING if status.can_answer else _NOT_SERVING
                await self._servicer.set(f"{EXPLAIN_SERVICE}/{name}", told)
            self._models = set(states)

    async def drain(self) -> None:
        """Everything but liveness is NOT_SERVING from now on; watchers are told."""
        async with self._updating:
            self._draining, self.ready = True, False
            for service in ("", READINESS, *SERVICES, *(f"{EXPLAIN_SERVICE}/{name}" for name in self._models)):
                await self._servicer.set(service, _NOT_SERVING)
