"""What happens in a server, as events that observers are told: log lines, metrics and traces are observers.

Each event is reported from one place. An observer overrides the methods that it wants.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)


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
    """

    method: str
    request_id: str
    peer: str
    code: str
    duration_s: float
    fields: dict[str, object] = field(default_factory=dict)
    error: Exception | None = None
    is_fault: bool = False


class Observer:
    """Is told what happens, on the thread where it happens. Must return at once; `model` is the model's name."""

    def admitted(self, *, model: str, in_stream: bool) -> None:
        """An image took a place in a model's queue."""

    def decoded(self, *, model: str, duration_s: float) -> None:
        """An image was decoded and fitted to the model's input."""

    def batch_started(self, *, model: str, device: str, size: int) -> None:
        """A device begins to run a batch of `size` images."""

    def batch_ended(self, *, model: str, device: str, size: int, failed: int, duration_s: float) -> None:
        """A device has run a batch; `failed` of its images have no result."""

    def step_ended(self, *, model: str, device: str, duration_s: float) -> None:
        """A device has run one step of an explanation that takes many."""

    def frame_dropped(self, *, model: str) -> None:
        """A frame of a stream was given up for a newer one."""

    def model_changed(self, *, model: str, state: str, message: str) -> None:
        """A model is "loading", "ready", "failed" or "unloaded" from now on; `message` says why or how."""

    def answered(self, call: CallEnd) -> None:
        """A call has ended well."""

    def refused(self, call: CallEnd) -> None:
        """A call has ended with an error, or was cancelled."""


class Observers(Observer):
    """Tells several observers. One that fails harms nobody: its error is logged."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        """Tell `observers`, in order."""
        self._observers = tuple(observers)

    def _tell(self, event: str, *call: CallEnd, **values: object) -> None:
        for observer in self._observers:
            try:
                getattr(observer, event)(*call, **values)
            except Exception:
                _log.exception("an observer failed on %s", event)

    def admitted(self, *, model: str, in_stream: bool) -> None:
        """See `Observer`."""
        self._tell("admitted", model=model, in_stream=in_stream)

    def decoded(self, *, model: str, duration_s: float) -> None:
        """See `Observer`."""
        self._tell("decoded", model=model, duration_s=duration_s)

    def batch_started(self, *, model: str, device: str, size: int) -> None:
        """See `Observer`."""
        self._tell("batch_started", model=model, device=device, size=size)

    def batch_ended(self, *, model: str, device: str, size: int, failed: int, duration_s: float) -> None:
        """See `Observer`."""
        self._tell("batch_ended", model=model, device=device, size=size, failed=failed, duration_s=duration_s)

    def step_ended(self, *, model: str, device: str, duration_s: float) -> None:
        """See `Observer`."""
        self._tell("step_ended", model=model, device=device, duration_s=duration_s)

    def frame_dropped(self, *, model: str) -> None:
        """See `Observer`."""
        self._tell("frame_dropped", model=model)

    def model_changed(self, *, model: str, state: str, message: str) -> None:
        """See `Observer`."""
        self._tell("model_changed", model=model, state=state, message=message)

    def answered(self, call: CallEnd) -> None:
        """See `Observer`."""
        self._tell("answered", call)

    def refused(self, call: CallEnd) -> None:
        """See `Observer`."""
        self._tell("refused", call)
