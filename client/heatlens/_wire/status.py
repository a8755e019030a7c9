"""From a failed gRPC call or a stream's failed frame to our exception: the only file that reads google.rpc.Status."""

from collections.abc import Iterable

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from heatlens._exceptions import (
    FieldViolation,
    HeatlensError,
    InternalError,
    NotFoundError,
    StatusCode,
    UnavailableError,
    error_class,
)
from heatlens._wire.field_names import argument_of

REQUEST_ID_KEY = "x-request-id"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
REPLICA_DIED = "REPLICA_DIED"
_ACTOR_DIED = "The actor died"
"""How Ray's proxy begins to say that a replica is gone: by INTERNAL, and then by where it ran."""
CONNECTION_LOST = "CONNECTION_LOST"
_STREAM_REMOVED = "Stream removed"
"""How gRPC's core begins to say that a connection broke within a call."""
_DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.RequestInfo,
)
_CODES = {code.value[0]: StatusCode(code.name) for code in grpc.StatusCode if code is not grpc.StatusCode.OK}


def error_of(error: grpc.RpcError, request_id: str) -> HeatlensError:
    """Turn a failed call into our exception, with the details that the server sent.

    Args:
        error: what a grpc or grpc.aio call raised.
        request_id: the id sent with the call, used if the server sent none back.
    """
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return InternalError(str(error), request_id=request_id)
    code = StatusCode(error.code().name)
    trailing = {key: value for key, value in error.trailing_metadata() or () if isinstance(value, str)}
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        status = None
    message = error.details() or code.value
    if code is StatusCode.INTERNAL and message.startswith(_ACTOR_DIED):
        return UnavailableError("the replica died while it answered", reason=REPLICA_DIED, request_id=request_id)
    if code is StatusCode.UNAVAILABLE and status is None and message.startswith(_STREAM_REMOVED):
        return UnavailableError(message, reason=CONNECTION_LOST, request_id=request_id)
    return _error(
        code,
        message,
        status,
        request_id=trailing.get(REQUEST_ID_KEY) or request_id,
        retry_after_s=_pushback_s(trailing.get(_PUSHBACK_KEY, "")),
    )


def frame_error_of(status: status_pb2.Status, request_id: str) -> HeatlensError:
    """Turn the status of a stream's failed frame into our exception.

    Args:
        status: what the server answered for the frame.
        request_id: the id sent with the stream, used if the status names none.
    """
    code = _CODES.get(status.code, StatusCode.UNKNOWN)
    return _error(code, status.message or code.value, status, request_id=request_id, retry_after_s=None)


def _error(
    code: StatusCode,
    message: str,
    status: status_pb2.Status | None,
    *,
    request_id: str,
    retry_after_s: float | None,
) -> HeatlensError:
    """Make the exception of a code, with what the status' details add or know better, in the words of the SDK."""
    reason: str | None = None
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    for detail in _details(status):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = detail.reason, dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            for item in detail.field_violations:
                argument = argument_of(item.field)
                violations.append(FieldViolation(argument, item.description))
                message = message.replace(f"{item.field}: ", f"{argument}: ", 1)
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        elif isinstance(detail, error_details_pb2.RequestInfo):
            request_id = detail.request_id or request_id
    return error_class(code)(
        message,
        code=code,
        reason=reason,
        metadata=metadata,
        request_id=request_id,
        field_violations=violations,
        retry_after_s=retry_after_s,
    )


def unknown_model(error: NotFoundError, model: str | None) -> NotFoundError:
    """Say what NOT_FOUND means of a health check: the health protocol (grpc.health.v1) sends the bare code."""
    if model is None:
        return error
    return NotFoundError(
        f"the server has no model named {model!r}", reason="MODEL_NOT_FOUND", request_id=error.request_id
    )


def _details(status: status_pb2.Status | None) -> Iterable[Message]:
    """Return the known google.rpc details of a status; none if they are missing or damaged."""
    details: list[Message] = []
    for packed in status.details if status is not None else ():
        for kind in _DETAILS:
            detail = kind()
            try:
                if packed.Unpack(detail):
                    details.append(detail)
            except DecodeError:
                continue
    return details


def _pushback_s(text: str) -> float | None:
    """Read grpc-retry-pushback-ms; negative or unreadable means: do not retry."""
    return int(text) / 1000 if text.isascii() and text.isdigit() else None
