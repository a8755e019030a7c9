"""What is known of the call that is being handled: its request id, and what its log line is to say."""

from contextvars import ContextVar
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call.

    Attributes:
        request_id: the caller's, or a random one.
        fields: what the handler adds to the call's log line.
    """

    request_id: str
    fields: dict[str, object] = field(default_factory=dict)


_current: ContextVar[CallRecord] = ContextVar("heatlens_call")


def current_record() -> CallRecord:
    """The record of the call that this task handles; outside of calls an empty one."""
    return _current.get(None) or CallRecord(request_id="")


def set_current_record(record: CallRecord) -> None:
    """From now on this task, and the tasks it starts, handle that call."""
    _current.set(record)
