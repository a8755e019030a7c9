"""Log lines: one per call and one per change of a model's state."""

import logging

from heatlens_server.core.errors import HeatlensError
from heatlens_server.core.events import CallEnd, Observer

_calls = logging.getLogger("heatlens.rpc")
_models = logging.getLogger("heatlens")

_SHOWN_CHARACTERS = 500
"""How much of an error a log line repeats."""


class LogObserver(Observer):
    """Writes log lines. What the lines say beyond their message is in their fields."""

    def __init__(self, *, ok_share: float = 1.0) -> None:
        """Write the lines of so large a share of the calls that end well, evenly among them, and all others."""
        self._ok_share = ok_share
        self._owed = 0.0

    def answered(self, call: CallEnd) -> None:
        """Write the call's line, or leave it out."""
        self._owed += self._ok_share
        # Sums of shares such as 0.1 fall short of a whole by their rounding.
        if self._owed > 1.0 - 1e-9:
            self._owed -= 1.0
            _write(call, logging.INFO)

    def refused(self, call: CallEnd) -> None:
        """Write the call's line: with the reason, or with the traceback if the fault is the server's."""
        error = call.error
        if error is None:
            _write(call, logging.INFO)
        elif isinstance(error, HeatlensError) and not call.is_fault:
            _write(call, logging.INFO, error=error.message[:_SHOWN_CHARACTERS], reason=error.reason)
        else:
            _write(call, logging.ERROR, exc_info=error, error=repr(error)[:_SHOWN_CHARACTERS])

    def model_changed(
        self, *, model: str, version: str = "", state: str, message: str, fault: Exception | None = None
    ) -> None:
        """Write that a model is ready, failed to load, is unavailable, idle or unloaded.

        With the traceback of what was unexpected.
        """
        model = f"{model}:{version}" if version else model
        if state == "ready":
            _models.info("model %s ready: %s", model, message)
        elif state == "failed":
            _models.error("model %s failed to load: %s", model, message, exc_info=fault)
        elif state == "unavailable":
            _models.error("model %s is unavailable: it %s", model, message)
        elif state == "idle":
            _models.info("model %s is unloaded until a request asks for it: %s", model, message)
        elif state == "unloaded":
            _models.info("model %s unloaded", model)

    def device_changed(self, *, model: str, device: str, fault: str) -> None:
        """Write that a device was taken out, or works again."""
        if fault:
            _models.error("model %s is degraded: %s is taken out, as %s", model, device, fault)
        else:
            _models.info("model %s: %s works again", model, device)


def _write(call: CallEnd, level: int, *, exc_info: Exception | None = None, **fields: str) -> None:
    if not _calls.isEnabledFor(level):
        return
    _calls.log(
        level,
        "call",
        exc_info=exc_info,
        extra={
            "method": call.method,
            "code": call.code,
            "duration_ms": round(call.duration_s * 1e3, 3),
            "request_id": call.request_id,
            "peer": call.peer,
            **call.fields,
            **fields,
        },
    )
