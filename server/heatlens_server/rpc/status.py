"""From a domain error to google.rpc.Status: the only place that knows both."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from heatlens_server import errors

DOMAIN = "heatlens"
REQUEST_ID_KEY = "x-request-id"

_CODES: dict[type[errors.HeatlensError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelLoading: grpc.StatusCode.UNAVAILABLE,
    errors.ModelFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ServerDraining: grpc.StatusCode.UNAVAILABLE,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DeviceOutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Unimplemented: grpc.StatusCode.UNIMPLEMENTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

_MAX_MESSAGE_CHARACTERS = 1000
_MAX_VIOLATIONS = 16
"""Status details travel in a header, which peers limit to about 8 KiB."""


@dataclass(frozen=True, slots=True)
class WireStatus:
    """What `grpc.aio.ServicerContext.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_wire(error: BaseException, request_id: str) -> WireStatus:
    """The status for any exception.

    Anything but a HeatlensError, and every InternalError, becomes INTERNAL with the request id and nothing else.
    """
    if not isinstance(error, errors.HeatlensError) or isinstance(error, errors.InternalError):
        error = errors.InternalError(f"internal error; request id {request_id}")
    code = _CODES[type(error)]
    message = error.message[:_MAX_MESSAGE_CHARACTERS]
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in _details(error, message, request_id):
        status.details.add().Pack(detail)
    metadata: list[tuple[str, str | bytes]] = [
        (REQUEST_ID_KEY, request_id),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]
    if error.retry_after_s is not None:
        metadata.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
    return WireStatus(code, message, tuple(metadata))


def _details(error: errors.HeatlensError, message: str, request_id: str) -> Sequence[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=error.retry_after_s)))
    if isinstance(error, errors.InvalidArgument):
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                    for v in error.violations[:_MAX_VIOLATIONS]
                ]
            )
        )
    elif isinstance(error, errors.ModelNotFound):
        details.append(error_details_pb2.ResourceInfo(resource_type="heatlens.v1.Model", resource_name=error.name))
    elif isinstance(error, errors.ModelFailed):
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="MODEL_STATE", subject=error.name, description=message
                    )
                ]
            )
        )
    return details
