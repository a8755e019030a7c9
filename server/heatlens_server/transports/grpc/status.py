"""From a domain error to google.rpc.Status: the only place that knows both."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from heatlens_server.api.calls import is_fault
from heatlens_server.core import errors

DOMAIN = "heatlens"
REQUEST_ID_KEY = "x-request-id"

_CODES: dict[type[errors.HeatlensError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ModelChangeRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.VersionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelLoading: grpc.StatusCode.UNAVAILABLE,
    errors.ModelFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ModelUnloaded: grpc.StatusCode.UNAVAILABLE,
    errors.ModelInterrupted: grpc.StatusCode.UNAVAILABLE,
    errors.ModelFilesChanged: grpc.StatusCode.FAILED_PRECONDITION,
    errors.CompanionFailed: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ServerDraining: grpc.StatusCode.UNAVAILABLE,
    errors.QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StreamLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.BytesInFlight: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.PeerTooSlow: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.FrameDropped: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ImageMemoryFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineExpired: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.DeviceOutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.InternalError: grpc.StatusCode.INTERNAL,
}

# A status travels in headers, which peers limit to 8 KiB in all: beyond that the caller would get RESOURCE_EXHAUSTED
# from its own channel and no details. The message travels twice, percent-encoded and in the details; the details are
# in base64. With these the headers stay below 7.5 KiB whatever an error repeats of a request.
_MAX_MESSAGE_BYTES = 1024
_MAX_METADATA_BYTES = 1024
_MAX_VIOLATIONS_BYTES = 2048
_MAX_TEXT_BYTES = 512
_CUT = "..."


@dataclass(frozen=True, slots=True)
class WireStatus:
    """What `grpc.aio.ServicerContext.abort` takes."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


def to_wire(error: BaseException, request_id: str) -> WireStatus:
    """The status that a call ends with, for any exception. See `to_status` for what it says."""
    error = _shown(error, request_id)
    status = to_status(error, request_id)
    metadata: list[tuple[str, str | bytes]] = [
        (REQUEST_ID_KEY, request_id),
        ("grpc-status-details-bin", status.SerializeToString()),
    ]
    if error.retry_after_s is not None:
        metadata.append(("grpc-retry-pushback-ms", str(round(error.retry_after_s * 1000))))
    return WireStatus(_CODES[type(error)], status.message, tuple(metadata))


def to_status(error: BaseException, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status for any exception, as a call ends with it or a stream carries it.

    Anything but a HeatlensError, and every InternalError, becomes INTERNAL with the request id and nothing else.
    """
    error = _shown(error, request_id)
    message = _cut(error.message, _MAX_MESSAGE_BYTES, escape_factor=3)
    status = status_pb2.Status(code=_CODES[type(error)].value[0], message=message)
    for detail in _details(error, message, request_id):
        status.details.add().Pack(detail)
    return status


def _shown(error: BaseException, request_id: str) -> errors.HeatlensError:
    """The error as callers may see it."""
    if isinstance(error, errors.HeatlensError) and not is_fault(error):
        return error
    return errors.InternalError(f"internal error; request id {request_id}")


def _details(error: errors.HeatlensError, message: str, request_id: str) -> Sequence[Message]:
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_metadata(error)),
        error_details_pb2.RequestInfo(request_id=request_id),
    ]
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=timedelta(seconds=error.retry_after_s)))
    if isinstance(error, errors.InvalidArgument):
        details.append(_bad_request(error))
    elif isinstance(error, errors.ModelNotFound):
        name = _cut(error.name, _MAX_TEXT_BYTES)
        details.append(error_details_pb2.ResourceInfo(resource_type="heatlens.v1.Model", resource_name=name))
    elif isinstance(error, errors.ModelFailed | errors.CompanionFailed):
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="MODEL_STATE", subject=_cut(error.name, _MAX_TEXT_BYTES), description=message
                    )
                ]
            )
        )
    return details


def _bad_request(error: errors.InvalidArgument) -> error_details_pb2.BadRequest:
    """The wrong fields, as many as there is room for and at least the first."""
    found = error_details_pb2.BadRequest()
    for violation in error.violations:
        found.field_violations.add(
            field=_cut(violation.field, _MAX_TEXT_BYTES), description=_cut(violation.description, _MAX_TEXT_BYTES)
        )
        if found.ByteSize() > _MAX_VIOLATIONS_BYTES:
            del found.field_violations[-1]
            break
    return found


def _metadata(error: errors.HeatlensError) -> dict[str, str]:
    """The error's metadata, as much as there is room for, in order."""
    kept: dict[str, str] = {}
    room_bytes = _MAX_METADATA_BYTES
    for key, value in error.metadata.items():
        text = _cut(value, _MAX_TEXT_BYTES)
        room_bytes -= len(key) + len(text.encode())
        if room_bytes < 0:
            break
        kept[key] = text
    return kept


def _cut(text: str, max_bytes: int, *, escape_factor: int = 1) -> str:
    """Cut a text to `max_bytes` of UTF-8; what is cut ends in dots.

    Args:
        text: any text.
        max_bytes: room for the result.
        escape_factor: how many bytes stand for one that is not printable ASCII: 3 where gRPC percent-encodes.
    """
    # What Unicode cannot encode (half a surrogate pair, from a file name) protobuf would refuse.
    text = text.encode(errors="replace").decode()
    used_bytes = 0
    kept = 0
    for i, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        used_bytes += 1 if plain else escape_factor * len(character.encode())
        if used_bytes > max_bytes:
            return text[:kept] + _CUT
        if used_bytes <= max_bytes - len(_CUT):
            kept = i + 1
    return text
