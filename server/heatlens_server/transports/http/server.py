"""The HTTP server of /metrics and of probes: prometheus-client's own, in threads of its own."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, start_http_server

from heatlens_server.core.errors import ConfigError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

ANSWER_S = 4.0
"""How long a probe waits for the event loop: less than the 5 s after which an orchestrator counts it as failed."""

Probe = Callable[[], bool]
"""Called on the event loop; must return at once."""


class MetricsServer:
    """Answers every GET with the metrics of a registry, in the format that the scraper asks for, but for its probes.

    Attributes:
        port: bound.
    """

    def __init__(
        self, listen: str, registry: CollectorRegistry, probes: Mapping[str, Probe], *, answer_s: float = ANSWER_S
    ) -> None:
        """Bind, and answer from now on. To be called on the event loop that probes ask.

        Args:
            listen: "host:port"; port 0 for any free one.
            registry: holds the metrics.
            probes: by their paths, such as "/ready": 200 if they say so, 503 if not, or if the loop does not answer.
            answer_s: how long they wait for the loop, in seconds.

        Raises:
            ConfigError: the address cannot be bound.
        """
        host, _, port = listen.rpartition(":")
        try:
            self._server, self._thread = start_http_server(int(port), host.strip("[]"), registry)
        except OSError as error:
            raise ConfigError(f"metrics.listen: cannot listen on {listen}: {error.strerror or error}") from None
        self.port = self._server.server_port
        loop, metrics = asyncio.get_running_loop(), self._server.get_app()
        assert metrics is not None

        def answer(environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            probe = probes.get(path) if environ["REQUEST_METHOD"] == "GET" else None
            if probe is None:
                return metrics(environ, start_response)
            serves = _ask(loop, probe, answer_s)
            start_response("200 OK" if serves else "503 Service Unavailable", [("Content-Type", "text/plain")])
            return [f"{'' if serves else 'not '}{path.strip('/')}\n".encode()]

        self._server.set_app(answer)

    def close(self) -> None:
        """Answer no more. Returns within a second. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _ask(loop: asyncio.AbstractEventLoop, probe: Probe, answer_s: float) -> bool:
    answer: Future[bool] = Future()
    try:
        loop.call_soon_threadsafe(lambda: answer.set_result(probe()))
        return answer.result(answer_s)
    # RuntimeError: the loop is closed.
    except (TimeoutError, RuntimeError):
        return False
