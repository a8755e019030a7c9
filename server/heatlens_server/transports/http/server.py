"""The HTTP server of /metrics: prometheus-client's own, in threads of its own."""

from prometheus_client import CollectorRegistry, start_http_server

from heatlens_server.core.errors import ConfigError


class MetricsServer:
    """Answers every GET with the metrics of a registry, in the format that the scraper asks for.

    Attributes:
        port: bound.
    """

    def __init__(self, listen: str, registry: CollectorRegistry) -> None:
        """Bind, and answer from now on.

        Args:
            listen: "host:port"; port 0 for any free one.
            registry: holds the metrics.

        Raises:
            ConfigError: the address cannot be bound.
        """
        host, _, port = listen.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise ConfigError(f"metrics.listen: cannot listen on {listen}: {error.strerror or error}") from None
        self.port = self._server.server_port

    def close(self) -> None:
        """Answer no more. Returns within a second. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
