"""The gRPC server object: its options, its credentials and its port."""

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from heatlens_server.api.calls import CallGate
from heatlens_server.config import ServerConfig, TlsConfig
from heatlens_server.core.errors import ConfigError
from heatlens_server.transports.grpc.health import SERVICES
from heatlens_server.transports.grpc.interceptor import CallInterceptor

_KEEPALIVE_OPTIONS = (
    # Finds dead peers in about a minute, and allows clients to ping as often as the SDK does (every 30 s).
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
)


def make_server(config: ServerConfig, gate: CallGate) -> grpc.aio.Server:
    """Make a server with limits, keepalive and the call interceptor, without services and without a port."""
    return grpc.aio.server(
        interceptors=[CallInterceptor(gate)],
        options=[
            ("grpc.max_receive_message_length", config.max_message_bytes),
            ("grpc.max_send_message_length", config.max_message_bytes),
            # With the default of 1, a second server on the same port would start and take half of the connections.
            ("grpc.so_reuseport", 0),
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
    try:
        if config.tls is None:
            port = server.add_insecure_port(config.listen)
        else:
            port = server.add_secure_port(config.listen, _credentials(config.tls))
    except RuntimeError:
        port = 0
    if port == 0:
        raise ConfigError(f"server.listen: cannot listen on {config.listen}: is another server using that port?")
    return port


def enable_reflection(server: grpc.aio.Server) -> None:
    """Let tools such as grpcurl ask for the services."""
    names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    try:
        key, certificate = tls.private_key.read_bytes(), tls.certificate.read_bytes()
        client_ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    except OSError as error:
        raise ConfigError(f"server.tls: cannot read {error.filename}: {error.strerror}") from None
    return grpc.ssl_server_credentials(
        [(key, certificate)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )
