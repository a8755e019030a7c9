"""Traces for OpenTelemetry: a span per call, below it one for each stage, and one per batch, linked to its images.

The span of a call continues its caller's trace, by W3C's `traceparent` or what OTEL_PROPAGATORS says. A frame of a
stream begins a trace of its own, linked to its stream's span: a camera's stream would otherwise be one trace of
millions of spans. Exporter, sampler and service name are set by OpenTelemetry's OTEL_* variables.
"""

import os
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.util.types import AttributeValue

from heatlens_server.core.events import CallEnd, Observer, Trace

_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that make a server's span an error by OpenTelemetry's conventions for gRPC; others are their callers'."""

_FIELDS = ("model", "explanation", "batch_size")
"""What of a call's fields its span has as attributes."""


def otlp_exporter() -> SpanExporter:
    """Sends spans by OTLP over gRPC, to where OTEL_EXPORTER_OTLP_ENDPOINT says.

    Raises:
        ImportError: the exporter is not installed.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415 - tests have another

    exporter: SpanExporter = OTLPSpanExporter()
    return exporter


class Tracing(Observer):
    """Makes spans of events. Thread-safe."""

    def __init__(self, exporter: SpanExporter) -> None:
        """Send spans by `exporter`, from a thread of its own."""
        resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "heatlens")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("heatlens", version("heatlens"))

    def close(self) -> None:
        """Send what is left, which may take as long as the exporter's timeout."""
        self._provider.shutdown()

    def call_began(self, *, method: str, request_id: str, headers: Mapping[str, object], trace: Trace) -> None:
        """Begin the call's span."""
        service, _, name = method.strip("/").rpartition("/")
        trace.span = self._tracer.start_span(
            method.strip("/"),
            context=propagate.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": service,
                "rpc.method": name,
                "heatlens.request_id": request_id,
            },
        )

    def answered(self, call: CallEnd) -> None:
        """End the call's span."""
        _end_call(call)

    def refused(self, call: CallEnd) -> None:
        """End the call's span."""
        _end_call(call)

    def frame_began(self, *, model: str, frame_id: int, call: Trace, trace: Trace) -> None:
        """Begin the frame's span."""
        stream = _recorded(call)
        if stream is not None:
            trace.span = self._tracer.start_span(
                "frame",
                context=Context(),
                links=[Link(stream.get_span_context())],
                attributes={"heatlens.model": model, "heatlens.frame_id": frame_id},
            )

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """End the frame's span."""
        frame = _recorded(trace)
        if frame is not None:
            frame.set_attribute("heatlens.outcome", outcome)
            if outcome == "failed":
                frame.set_status(StatusCode.ERROR)
            frame.end()

    def decoded(self, *, model: str, duration_s: float, trace: Trace | None) -> None:
        """Add the stage."""
        now_s = time.monotonic()
        self._add("decode", trace, (now_s - duration_s, now_s), {"heatlens.model": model})

    def batch_ended(
        self, *, model: str, device: str, size: int, failed: int, duration_s: float, traces: Sequence[Trace]
    ) -> None:
        """Add the batch below the first of its images that is recorded, so that the same sampling applies."""
        recorded = [(trace, span) for trace in traces if (span := _recorded(trace)) is not None]
        if recorded:
            now_s = time.monotonic()
            about: dict[str, AttributeValue] = {"heatlens.model": model, "heatlens.device": device}
            about |= {"heatlens.batch_size": size, "heatlens.failed": failed}
            links = [Link(span.get_span_context()) for _, span in recorded]
            self._add("batch", recorded[0][0], (now_s - duration_s, now_s), about, links=links)

    def step_ended(self, *, model: str, device: str, duration_s: float, trace: Trace | None) -> None:
        """Add the step."""
        now_s = time.monotonic()
        about: dict[str, AttributeValue] = {"heatlens.model": model, "heatlens.device": device}
        self._add("step", trace, (now_s - duration_s, now_s), about)

    def explained(
        self,
        *,
        model: str,
        explanation: str,
        queue_s: float,
        compute_s: float,  # noqa: ARG002 - the event's
        encode_s: float,
        began_at: float,
        ended_at: float,
        trace: Trace | None,
    ) -> None:
        """Add the stages."""
        about: dict[str, AttributeValue] = {"heatlens.model": model, "heatlens.explanation": explanation}
        now_s = time.monotonic()
        self._add("queue", trace, (began_at - queue_s, began_at), about)
        self._add("compute", trace, (began_at, ended_at), about)
        self._add("encode", trace, (now_s - encode_s, now_s), about)

    def _add(
        self,
        name: str,
        trace: Trace | None,
        ran: tuple[float, float],
        about: Mapping[str, AttributeValue],
        links: Sequence[Link] = (),
    ) -> None:
        """Add a span below that of a call or frame; it ran from and until then on `time.monotonic`, in seconds."""
        parent = _recorded(trace)
        if parent is not None:
            # Where wall time and monotonic time stand now: the former may be put right meanwhile.
            offset_ns = time.time_ns() - time.monotonic_ns()
            context = set_span_in_context(parent, Context())
            span = self._tracer.start_span(
                name,
                context=context,
                links=links,
                attributes=about,
                start_time=offset_ns + round(ran[0] * 1e9),
            )
            span.end(offset_ns + round(ran[1] * 1e9))


def _recorded(trace: Trace | None) -> Span | None:
    """The span of a call or frame, ended or not, if it is sampled."""
    span = None if trace is None else trace.span
    return span if isinstance(span, Span) and span.get_span_context().trace_flags.sampled else None


def _end_call(call: CallEnd) -> None:
    span = _recorded(call.trace)
    if span is None:
        return
    span.set_attribute("rpc.response.status_code", call.code)
    for name, value in call.fields.items():
        if (name in _FIELDS or name.startswith("frames_")) and isinstance(value, str | int):
            span.set_attribute(f"heatlens.{name}", value)
    if call.code in _FAULTS:
        span.set_status(StatusCode.ERROR, call.code)
        span.set_attribute("error.type", call.code)
    span.end()
