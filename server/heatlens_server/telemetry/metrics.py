"""Metrics for Prometheus: counters and histograms of what events tell.

What a server is at one moment, as the length of its queues, is no event: `transports/http/state.py` reads it.
A label's value is a name of the configuration or one of a fixed few, never a caller's text, so that no caller makes
series.
"""

from collections.abc import Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics

from heatlens_server.core.events import CallEnd, Observer, Trace

# They would double the number of series, and Prometheus finds resets by itself.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Bounds of the buckets of durations, from a small model on a GPU to an explanation of many steps on a CPU."""

_IMAGES: Final = (1, 2, 4, 8, 16, 32, 64, 128)
"""Bounds of the buckets of batch sizes."""


class Metrics(Observer):
    """Counts what happens. Thread-safe.

    Attributes:
        registry: holds the metrics, and those of the process.
    """

    def __init__(self) -> None:
        """Nothing has happened."""
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"heatlens_{name}", about, labels, registry=registry)

        def seconds(name: str, about: str, *labels: str) -> Histogram:
            return Histogram(f"heatlens_{name}_seconds", about, labels, buckets=_SECONDS, registry=registry)

        self._calls = counter(
            "calls",
            "Calls that have ended. model and explanation are empty where a call names none that there is.",
            *("rpc", "model", "explanation", "code"),
        )
        self._call_s = seconds("call_duration", "Calls, from the first byte to the last.", "rpc", "model")
        self._decode_s = seconds("decode_duration", "Decoding of an image and fitting it to the model.", "model")
        self._queue_s = seconds("queue_duration", "Explained images: from decoded to running.", "model")
        self._compute_s = seconds(
            "compute_duration", "Explained images: their batch, or all of their steps, on the device.", "model"
        )
        self._encode_s = seconds("encode_duration", "Explained images: making of the answer.", "model")
        self._explained = counter(
            "images_explained", "Images and frames that were explained.", *("model", "explanation")
        )
        self._batches = Histogram(
            "heatlens_batch_size_images", "Images of a batch.", ["model"], buckets=_IMAGES, registry=registry
        )
        self._failed = counter("images_failed", "Images of batches that have no result.", "model")
        self._steps = counter("steps", "Steps of explanations that take many.", "model")
        self._busy_s = counter("device_busy_seconds", "How long a device ran batches and steps.", "model", "device")
        self._frames = counter(
            "frames", "Answered frames: explained, dropped, skipped or failed.", *("model", "outcome")
        )
        self._frame_age_s = seconds(
            "frame_age", "Explained frames: from the reading to the end of the writing of the answer.", "model"
        )
        self._changes = counter("model_changes", "Changes of a model to a state, as ready or failed.", "model", "state")
        self._load_s = seconds("model_load_duration", "Making of a model's engine.", "model")
        self._exports = counter(
            "export_cache_lookups", "Models that were loaded by an export: a hit, or a miss.", *("model", "result")
        )

    def decoded(self, *, model: str, duration_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count an image."""
        self._decode_s.labels(model).observe(duration_s)

    def batch_ended(
        self,
        *,
        model: str,
        device: str,
        size: int,
        failed: int,
        duration_s: float,
        traces: Sequence[Trace],  # noqa: ARG002 - the event's
    ) -> None:
        """Count a batch."""
        self._batches.labels(model).observe(size)
        self._busy_s.labels(model, device).inc(duration_s)
        self._failed.labels(model).inc(failed)

    def step_ended(self, *, model: str, device: str, duration_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count a step."""
        self._steps.labels(model).inc()
        self._busy_s.labels(model, device).inc(duration_s)

    def explained(
        self, *, model: str, explanation: str, queue_s: float, compute_s: float, encode_s: float, **_rest: object
    ) -> None:
        """Count an image."""
        self._explained.labels(model, explanation).inc()
        self._queue_s.labels(model).observe(queue_s)
        self._compute_s.labels(model).observe(compute_s)
        self._encode_s.labels(model).observe(encode_s)

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count a frame."""
        self._frames.labels(model, outcome).inc()
        if outcome == "explained":
            self._frame_age_s.labels(model).observe(age_s)

    def model_built(self, *, model: str, duration_s: float, cached: bool | None) -> None:
        """Count a model."""
        self._load_s.labels(model).observe(duration_s)
        if cached is not None:
            self._exports.labels(model, "hit" if cached else "miss").inc()

    def model_changed(self, *, model: str, state: str, **_rest: object) -> None:
        """Count a change."""
        self._changes.labels(model, state).inc()

    def answered(self, call: CallEnd) -> None:
        """Count a call."""
        self._count(call)

    def refused(self, call: CallEnd) -> None:
        """Count a call."""
        self._count(call)

    def _count(self, call: CallEnd) -> None:
        rpc = call.method.rpartition("/")[2]
        model = call.fields.get("model", "")
        self._calls.labels(rpc, model, call.fields.get("explanation", ""), call.code).inc()
        self._call_s.labels(rpc, model).observe(call.duration_s)
