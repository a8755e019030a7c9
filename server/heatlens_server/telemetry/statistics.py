"""How much each model was asked since the server started, and what that took: counts and sums, for clients that ask."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from heatlens_server.core.events import CallEnd, Observer, Trace


@dataclass(frozen=True, slots=True)
class Total:
    """How often something was done, and how many seconds it took in all."""

    count: int = 0
    seconds: float = 0.0

    def plus(self, seconds: float) -> "Total":
        """The total with one more."""
        return Total(self.count + 1, self.seconds + seconds)


@dataclass(frozen=True, slots=True)
class ModelCounts:
    """What all versions of a model did.

    Attributes:
        answered: calls, and requests and frames of streams, that were answered, from the first byte to the last.
        failed: those that were not, or that were cancelled.
        decoded: decoding of images and fitting them to the model.
        queued: explained images, from decoded to running.
        computed: explained images: their batch, or all of their steps, on the device.
        encoded: explained images: making of the answer.
        runs: batches and steps of devices.
        last_at: when an image was explained last, in seconds of Unix time; 0 for never.
    """

    answered: Total = Total()
    failed: Total = Total()
    decoded: Total = Total()
    queued: Total = Total()
    computed: Total = Total()
    encoded: Total = Total()
    runs: int = 0
    last_at: float = 0.0


class Statistics(Observer):
    """Counts what models do. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """Nothing has happened. `clock` tells Unix time in seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        self._models: defaultdict[str, ModelCounts] = defaultdict(ModelCounts)

    def of(self, model: str) -> ModelCounts:
        """The counts of a model by now."""
        with self._lock:
            return self._models.get(model, ModelCounts())

    def decoded(self, *, model: str, duration_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count an image."""
        with self._lock:
            now = self._models[model]
            self._models[model] = replace(now, decoded=now.decoded.plus(duration_s))

    def batch_ended(
        self,
        *,
        model: str,
        device: str,  # noqa: ARG002 - the event's
        size: int,  # noqa: ARG002
        failed: int,  # noqa: ARG002
        duration_s: float,  # noqa: ARG002
        traces: Sequence[Trace],  # noqa: ARG002
    ) -> None:
        """Count a run."""
        self._count_run(model)

    def step_ended(self, *, model: str, device: str, duration_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count a run."""
        self._count_run(model)

    def explained(self, *, model: str, queue_s: float, compute_s: float, encode_s: float, **_rest: object) -> None:
        """Count an image."""
        with self._lock:
            now = self._models[model]
            self._models[model] = replace(
                now,
                queued=now.queued.plus(queue_s),
                computed=now.computed.plus(compute_s),
                encoded=now.encoded.plus(encode_s),
                last_at=self._clock(),
            )

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: Trace | None) -> None:  # noqa: ARG002 - the event's
        """Count a frame, unless it was not to be explained, or asked for a model that there is not."""
        if model and outcome in {"explained", "failed"}:
            self._count_request(model, age_s, answered=outcome == "explained")

    def answered(self, call: CallEnd) -> None:
        """Count a call."""
        self._count_call(call, answered=True)

    def refused(self, call: CallEnd) -> None:
        """Count a call."""
        self._count_call(call, answered=False)

    def _count_call(self, call: CallEnd, *, answered: bool) -> None:
        # Of a stream, its frames are counted.
        if (model := call.fields.get("model")) and not any(name.startswith("frames_") for name in call.fields):
            self._count_request(str(model), call.duration_s, answered=answered)

    def _count_request(self, model: str, seconds: float, *, answered: bool) -> None:
        with self._lock:
            now = self._models[model]
            self._models[model] = (
                replace(now, answered=now.answered.plus(seconds))
                if answered
                else replace(now, failed=now.failed.plus(seconds))
            )

    def _count_run(self, model: str) -> None:
        with self._lock:
            now = self._models[model]
            self._models[model] = replace(now, runs=now.runs + 1)
