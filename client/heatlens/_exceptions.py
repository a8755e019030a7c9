"""Every error that a client raises for a call, as one tree. `except heatlens.HeatlensError` catches them all.

* HeatlensError
  * InvalidArgumentError      the call is wrong; `field_violations` names the arguments or fields (also a ValueError)
  * UnauthenticatedError      the token is missing or wrong
  * PermissionDeniedError     the token does not allow this
  * NotFoundError             no model of that name
  * FailedPreconditionError   the state must change first: the model failed to load, or this client is closed
  * ResourceExhaustedError    too many requests are waiting; see `retry_after_s`
  * UnavailableError          no server there, or it is loading or shutting down; see `retry_after_s`
  * DeadlineExceededError     no answer within the timeout
  * CallCancelledError        the call was cancelled, by `close()` or by the server
  * UnimplementedError        this server does not have the method or option
  * InternalError             a fault in the server; quote `request_id` when you report it

| gRPC status code                                                  | exception                |
|-------------------------------------------------------------------|--------------------------|
| INVALID_ARGUMENT, OUT_OF_RANGE                                    | InvalidArgumentError     |
| UNAUTHENTICATED                                                   | UnauthenticatedError     |
| PERMISSION_DENIED                                                 | PermissionDeniedError    |
| NOT_FOUND                                                         | NotFoundError            |
| FAILED_PRECONDITION                                               | FailedPreconditionError  |
| RESOURCE_EXHAUSTED                                                | ResourceExhaustedError   |
| UNAVAILABLE                                                       | UnavailableError         |
| DEADLINE_EXCEEDED                                                 | DeadlineExceededError    |
| CANCELLED                                                         | CallCancelledError       |
| UNIMPLEMENTED                                                     | UnimplementedError       |
| INTERNAL, UNKNOWN, DATA_LOSS, ABORTED, ALREADY_EXISTS             | InternalError            |

A stream's frames fail with the same errors, as values: `FrameResult.error`. When the stream itself breaks, its error is
raised with `last_frame_id`: all frames up to that one were answered, so a new stream can start after it.

Not in the tree: a file that cannot be read raises the built-in FileNotFoundError or another OSError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class StatusCode(StrEnum):
    """The gRPC status codes of failed calls, by name."""

    CANCELLED = "CANCELLED"
    UNKNOWN = "UNKNOWN"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    PERMISSION_DENIED = "PERMISSION_DENIED"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    ABORTED = "ABORTED"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DATA_LOSS = "DATA_LOSS"
    UNAUTHENTICATED = "UNAUTHENTICATED"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One wrong argument or field.

    Attributes:
        field: an argument of the SDK ("top_k", "layers[1]"), or a path in the proto that is none.
        description: what is wrong with it.
    """

    field: str
    description: str


class HeatlensError(Exception):
    """A call failed.

    Attributes:
        message: what happened, for people.
        code: the status code.
        reason: UPPER_SNAKE_CASE and stable, for programs ("QUEUE_FULL"); the code's name if the server gave none.
        metadata: the message's dynamic parts, for programs.
        request_id: names this call in the server's log; None if the call was never sent.
        field_violations: the wrong arguments or fields; empty unless the call was wrong.
        retry_after_s: when the server says to try again, in seconds; None if it does not say.
        last_frame_id: of a broken stream, the last frame that was answered; None if none was, and for other calls.
    """

    default_code = StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: StatusCode | None = None,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        request_id: str | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).default_code
        self.reason = reason or self.code.value
        self.metadata = dict(metadata or {})
        self.request_id = request_id
        self.field_violations = tuple(field_violations)
        self.retry_after_s = retry_after_s
        self.last_frame_id: int | None = None

    def __repr__(self) -> str:
        request = "" if self.request_id is None else f", request_id={self.request_id!r}"
        return f"{type(self).__name__}({self.message!r}, reason={self.reason!r}{request})"


class InvalidArgumentError(HeatlensError, ValueError):
    """The call is wrong, whatever the server's state. Raised by the SDK before the call where it can tell."""

    default_code = StatusCode.INVALID_ARGUMENT

    @classmethod
    def of(cls, argument: str, description: str, *, reason: str = "INVALID_ARGUMENT") -> "InvalidArgumentError":
        """Make the error for a single wrong argument."""
        return cls(
            f"{argument}: {description}", reason=reason, field_violations=[FieldViolation(argument, description)]
        )


class UnauthenticatedError(HeatlensError):
    """The token is missing or wrong."""

    default_code = StatusCode.UNAUTHENTICATED


class PermissionDeniedError(HeatlensError):
    """The token does not allow this."""

    default_code = StatusCode.PERMISSION_DENIED


class NotFoundError(HeatlensError):
    """The server has no model of that name; `metadata["available"]` lists those it has."""

    default_code = StatusCode.NOT_FOUND


class FailedPreconditionError(HeatlensError):
    """The state must change first: the model failed to load (MODEL_FAILED), the client is closed (CLIENT_CLOSED).

    Or PyTorch failed to load, which this request needs beside the exported model (COMPANION_FAILED).
    Also a stream that is closed or finished, or not open yet: the reasons start with STREAM_.
    """

    default_code = StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(HeatlensError):
    """Too many requests are waiting, or the device is out of memory; or a stream dropped a frame (FRAME_DROPPED)."""

    default_code = StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(HeatlensError):
    """No server answers at the address, or it is loading the model or shutting down."""

    default_code = StatusCode.UNAVAILABLE


class DeadlineExceededError(HeatlensError):
    """No answer within the timeout. The timeout spans all retries."""

    default_code = StatusCode.DEADLINE_EXCEEDED


class CallCancelledError(HeatlensError):
    """The call was cancelled, by `close()` in another thread or task, or by the server."""

    default_code = StatusCode.CANCELLED


class UnimplementedError(HeatlensError):
    """This server does not have the method or option."""

    default_code = StatusCode.UNIMPLEMENTED


class InternalError(HeatlensError):
    """A fault in the server. Its log has more under `request_id`."""

    default_code = StatusCode.INTERNAL


_BY_CODE: dict[StatusCode, type[HeatlensError]] = {
    StatusCode.OUT_OF_RANGE: InvalidArgumentError,
    **{error.default_code: error for error in HeatlensError.__subclasses__()},
}


def error_class(code: StatusCode) -> type[HeatlensError]:
    """Return the exception for a status code, as in the table above."""
    return _BY_CODE.get(code, InternalError)
