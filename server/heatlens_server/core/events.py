"""What happens in a server, as events that observers are told: log lines, metrics and traces are observers.

Each event is reported from one place. An observer overrides the methods that it wants.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Trace:
    """What an observer keeps of one call or frame from its beginning to its end, as a tracer its span."""

    span: object = None


@dataclass(frozen=True, slots=True)
class CallEnd:
    """How one call ended, whatever the transport.

    Attributes:
        method: what was called, as the transport names it.
        request_id: the caller's, or a random one.
        peer: the caller's address.
        code: the status in the transport's terms: "OK", "INVALID_ARGUMENT", "CANCELLED".
        duration_s: from the first byte to the last, in seconds.
        fields: what the handler adds: the model, the numbers of a stream's frames.
        error: what it failed with; None if it did not, or was cancelled.
        is_fault: whether the error is the server's.
        trace: that of `Observer.call_began`.
    """

    method: str
    request_id: str
    peer: str
    code: str
    duration_s: float
    fields: dict[str, object] = field(default_factory=dict)
    error: Exception | None = None
    is_fault: bool = False
    trace: Trace | None = None


class Observer:
    """Is told what happens, on the thread where it happens. Must return at once; `model` is the model's name."""

    def call_began(self, *, method: str, request_id: str, headers: Mapping[str, object], trace: Trace) -> None:
        """A call has come; `answered` or `refused` follows.

        Args:
            method: what is called, as the transport names it.
            request_id: the caller's, or a random one.
            headers: what the caller sent beside its message, by names in lower case.
            trace: goes with the call.
        """

    def admitted(self, *, model: str, in_stream: bool) -> None:
        """An image took a place in a model's queue."""

    def decoded(self, *, model: str, duration_s: float, trace: Trace | None) -> None:
        """An image was decoded and fitted to the model's input; `trace` is that of its call or frame."""

    def batch_started(self, *, model: str, device: str, size: int) -> None:
        """A device begins to run a batch of `size` images."""

    def batch_ended(
        self, *, model: str, device: str, size: int, failed: int, duration_s: float, traces: Sequence[Trace]
    ) -> None:
        """A device has run a batch; `failed` of its images have no result. `traces` are those of its images."""

    def step_ended(self, *, model: str, device: str, duration_s: float, trace: Trace | None) -> None:
        """A device has run one step of an explanation that takes many; `trace` is that of its call or frame."""

    def explained(
        self,
        *,
        model: str,
        explanation: str,
        queue_s: float,
        compute_s: float,
        encode_s: float,
        began_at: float,
        ended_at: float,
        trace: Trace | None,
    ) -> None:
        """The answer of an image is made: of a call, or of a frame.

        Args:
            model: that explained it.
            explanation: the method's name.
            queue_s: from decoded to running, in seconds.
            compute_s: how long its batch, or all of its steps, ran, in seconds.
            encode_s: how long the answer took to make, in seconds.
            began_at: when its batch or first step began to run, on `time.monotonic`, in seconds.
            ended_at: when its batch or last step ended, on the same.
            trace: that of its call or frame.
        """

    def frame_began(self, *, model: str, frame_id: int, call: Trace, trace: Trace) -> None:
        """A frame that is to be explained was read: `call` is the trace of its stream, `trace` goes with the frame.

        If the frame is answered, `frame_answered` follows.
        """

    def frame_answered(self, *, model: str, outcome: str, age_s: float, trace: Trace | None) -> None:
        """A frame of a stream is answered.

        Args:
            model: the stream's.
            outcome: "explained", "dropped", "skipped" or "failed".
            age_s: from the reading of the frame to the end of the writing of its answer, in seconds.
            trace: that of `frame_began`; None if it was skipped.
        """

    def model_built(self, *, model: str, duration_s: float, cached: bool | None) -> None:
        """A model's engine is made.

        Args:
            model: which.
            duration_s: how long that took, in seconds.
            cached: whether its export was in the cache; None if it has none.
        """

    def model_changed(
        self, *, model: str, version: str = "", state: str, message: str, fault: Exception | None = None
    ) -> None:
        """A model is "loading", "ready", "failed", "unavailable", "idle" or "unloaded" from now on.

        Args:
            model: which.
            version: of several of its name, which; empty: the only one.
            state: its new state.
            message: why or how, for the operator: it may hold paths.
            fault: what it failed with, if that was unexpected.
        """

    def device_changed(self, *, model: str, device: str, fault: str) -> None:
        """A device of a model was taken out because of a fault or, without one, works again."""

    def answered(self, call: CallEnd) -> None:
        """A call has ended well."""

    def refused(self, call: CallEnd) -> None:
        """A call has ended with an error, or was cancelled."""


class Observers(Observer):
    """Tells several observers. One that fails harms no other: its error is logged."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        """Tell `observers`, in order."""
        for event in (name for name in vars(Observer) if not name.startswith("_")):
            # Those that do not override it need not be called.
            hearing = [one for one in observers if getattr(type(one), event) is not getattr(Observer, event)]
            setattr(self, event, partial(_tell, event, [getattr(observer, event) for observer in hearing]))


def _tell(event: str, methods: Sequence[Callable[..., None]], *call: CallEnd, **values: object) -> None:
    for method in methods:
        try:
            method(*call, **values)
        except Exception:
            _log.exception("an observer failed on %s", event)
