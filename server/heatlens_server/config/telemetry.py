"""What others may watch of a server: its metrics and traces."""

from typing import Annotated

from pydantic import AfterValidator

from heatlens_server.config.section import Section, is_host_and_port


def _check_listen(address: str) -> str:
    if address and not is_host_and_port(address):
        raise ValueError('must be "host:port" with a port from 0 to 65535, or empty')
    return address


class MetricsConfig(Section):
    """Metrics for Prometheus, by HTTP."""

    listen: Annotated[str, AfterValidator(_check_listen)] = ""
    """Where /metrics is served, without a token: "host:port", port 0 for any free one. Empty: nowhere."""


class TracingConfig(Section):
    """Traces for OpenTelemetry. Where they go, and how many, is set by OpenTelemetry's OTEL_* variables."""

    enabled: bool = False
    """Whether spans of calls, frames, batches and their stages are made and sent by OTLP."""
