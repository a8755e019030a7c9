"""From a failed gRPC call to our exception: the only file that reads google.rpc.Status."""

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
    error_class,
)

REQUEST_ID_KEY = "x-request-id"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
_DETAILS = (
    error_details_pb2.ErrorInfo,
    error_details_pb2.BadRequest,
    error_details_pb2.RetryInfo,
    error_details_pb2.RequestInfo,
)


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
    retry_after_s = _pushback_s(trailing.get(_PUSHBACK_KEY, ""))
    reason: str | None = None
    metadata: dict[str, str] = {}
    violations: list[FieldViolation] = []
    request_id = trailing.get(REQUEST_ID_KEY) or request_id
    for detail in _details(error):
        if isinstance(detail, error_details_pb2.ErrorInfo):
            reason, metadata = detail.reason, dict(detail.metadata)
        elif isinstance(detail, error_details_pb2.BadRequest):
            violations += [FieldViolation(item.field, item.description) for item in detail.field_violations]
        elif isinstance(detail, error_details_pb2.RetryInfo):
            retry_after_s = detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9
        elif isinstance(detail, error_details_pb2.RequestInfo):
            request_id = detail.request_id or request_id
    return error_class(code)(
        error.details() or code.value,
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


def _details(error: grpc.RpcError) -> Iterable[Message]:
    """Return the known google.rpc details of a failed call; none if they are missing or damaged."""
    try:
        status: status_pb2.Status | None = rpc_status.from_call(error)
    except (ValueError, DecodeError):
        return []
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
