"""Every error of the tree becomes one status that fits in the headers and says nothing that it must not say."""

from collections import Counter
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from heatlens_server.core import errors
from heatlens_server.core.errors import FieldViolation, HeatlensError, InvalidArgument, ModelFailed, ModelNotFound
from heatlens_server.transports.grpc.status import DOMAIN, REQUEST_ID_KEY, WireStatus, to_status, to_wire

HEADERS_BYTES = 8 * 1024
"""What a peer accepts by default."""

EXAMPLES: dict[type[HeatlensError], tuple[HeatlensError, grpc.StatusCode, str]] = {
    InvalidArgument: (
        InvalidArgument.of("options.top_k", "must be in [1, 10]", reason="INVALID_OPTION"),
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_OPTION",
    ),
    errors.PermissionDenied: (errors.PermissionDenied("no"), grpc.StatusCode.PERMISSION_DENIED, "ADMIN_REQUIRED"),
    errors.ModelChangeRefused: (
        errors.ModelChangeRefused("no"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_CHANGE_REFUSED",
    ),
    errors.Unauthenticated: (errors.Unauthenticated("no"), grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    ModelNotFound: (ModelNotFound("b", ["a"]), grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
    errors.VersionNotFound: (
        errors.VersionNotFound("a", "3", ["1", "2"]),
        grpc.StatusCode.NOT_FOUND,
        "VERSION_NOT_FOUND",
    ),
    errors.ModelLoading: (
        errors.ModelLoading("soon", retry_after_s=1.0),
        grpc.StatusCode.UNAVAILABLE,
        "MODEL_LOADING",
    ),
    ModelFailed: (ModelFailed("a", "no file"), grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED"),
    errors.ModelUnloaded: (
        errors.ModelUnloaded("a", "was replaced", retry_after_s=0.0),
        grpc.StatusCode.UNAVAILABLE,
        "MODEL_UNLOADED",
    ),
    errors.ModelInterrupted: (
        errors.ModelInterrupted("a", "hangs", retry_after_s=10.0),
        grpc.StatusCode.UNAVAILABLE,
        "MODEL_HUNG",
    ),
    errors.ModelFilesChanged: (
        errors.ModelFilesChanged("layer-2.pt"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "MODEL_FILES_CHANGED",
    ),
    errors.CompanionFailed: (
        errors.CompanionFailed("a", "no file"),
        grpc.StatusCode.FAILED_PRECONDITION,
        "COMPANION_FAILED",
    ),
    errors.ServerDraining: (
        errors.ServerDraining("bye", retry_after_s=0.05),
        grpc.StatusCode.UNAVAILABLE,
        "SERVER_DRAINING",
    ),
    errors.QueueFull: (errors.QueueFull("full", retry_after_s=0.25), grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    errors.ImageMemoryFull: (
        errors.ImageMemoryFull("large", retry_after_s=1.0),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "IMAGE_MEMORY_FULL",
    ),
    errors.DeadlineExpired: (errors.DeadlineExpired("late"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXPIRED"),
    errors.DeviceOutOfMemory: (
        errors.DeviceOutOfMemory("small", retry_after_s=1.0),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "DEVICE_OUT_OF_MEMORY",
    ),
    errors.StreamLimit: (
        errors.StreamLimit("crowded", retry_after_s=1.0),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "STREAM_LIMIT",
    ),
    errors.BytesInFlight: (
        errors.BytesInFlight("much", retry_after_s=0.5),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "BYTES_IN_FLIGHT",
    ),
    errors.PeerTooSlow: (
        errors.PeerTooSlow("slow", retry_after_s=1.0),
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "MESSAGE_TOO_SLOW",
    ),
    errors.FrameDropped: (errors.FrameDropped("old"), grpc.StatusCode.RESOURCE_EXHAUSTED, "FRAME_DROPPED"),
    errors.InternalError: (errors.InternalError("secret"), grpc.StatusCode.INTERNAL, "INTERNAL"),
}


def tree(root: type[HeatlensError]) -> set[type[HeatlensError]]:
    below = set(root.__subclasses__())
    return below.union(*(tree(child) for child in below))


def status_of(wire: WireStatus) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(wire.trailing_metadata)["grpc-status-details-bin"])


def detail(wire: WireStatus, kind):
    (found,) = [packed for packed in status_of(wire).details if packed.Is(kind.DESCRIPTOR)]
    message = kind()
    found.Unpack(message)
    return message


def header_bytes(wire: WireStatus) -> int:
    """What HTTP/2 counts: 32 bytes per header, names and values; messages percent-encoded, binary values in base64."""
    values = {"grpc-message": quote(wire.message), "grpc-status": "13"} | dict(wire.trailing_metadata)
    sizes = {key: len(value) if isinstance(value, str) else -(-len(value) // 3) * 4 for key, value in values.items()}
    return sum(32 + len(key) + size for key, size in sizes.items())


def test_examples_cover_the_whole_tree():
    assert tree(HeatlensError) == set(EXAMPLES)


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_every_error_has_its_code_and_each_detail_once(kind):
    error, code, reason = EXAMPLES[kind]
    wire = to_wire(error, "id-1")
    status = status_of(wire)
    assert wire.code is code
    assert status.code == code.value[0]
    assert status.message == wire.message != ""
    info = detail(wire, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (reason, DOMAIN)
    assert detail(wire, error_details_pb2.RequestInfo).request_id == "id-1"
    assert dict(wire.trailing_metadata)[REQUEST_ID_KEY] == "id-1"
    assert set(Counter(packed.type_url for packed in status.details).values()) == {1}
    assert len(wire.trailing_metadata) == len(dict(wire.trailing_metadata))


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_only_what_helps_to_retry_is_told_when(kind):
    error = EXAMPLES[kind][0]
    wire = to_wire(error, "id")
    pushback = dict(wire.trailing_metadata).get("grpc-retry-pushback-ms")
    if error.retry_after_s is None:
        assert pushback is None
        assert not any(packed.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for packed in status_of(wire).details)
    else:
        assert pushback == str(round(error.retry_after_s * 1000))
        retry = detail(wire, error_details_pb2.RetryInfo).retry_delay
        assert retry.ToTimedelta().total_seconds() == error.retry_after_s


def test_every_wrong_field_is_named():
    violations = [FieldViolation(f"options.class_ids.values[{i}]", f"class id {i} is wrong") for i in range(12)]
    sent = detail(to_wire(InvalidArgument(violations), "id"), error_details_pb2.BadRequest).field_violations
    assert [(v.field, v.description) for v in sent] == [(v.field, v.description) for v in violations]


def test_a_message_that_is_wrong_as_a_whole_names_no_field():
    whole, part = FieldViolation("", "the message is not valid protobuf"), FieldViolation("model", "too long")
    assert to_wire(InvalidArgument([whole]), "id").message == "the message is not valid protobuf"
    assert to_wire(InvalidArgument([whole, part]), "id").message == "the message is not valid protobuf; model: too long"


def test_unknown_model_names_it_and_what_there_is():
    wire = to_wire(ModelNotFound("b", ["a", "c"]), "id")
    resource = detail(wire, error_details_pb2.ResourceInfo)
    assert (resource.resource_type, resource.resource_name) == ("heatlens.v1.Model", "b")
    assert detail(wire, error_details_pb2.ErrorInfo).metadata == {"model": "b", "available": "a,c"}


def test_failed_model_says_why():
    (violation,) = detail(
        to_wire(ModelFailed("a", "no weights"), "id"), error_details_pb2.PreconditionFailure
    ).violations
    assert violation.subject == "a"
    assert "no weights" in violation.description


@pytest.mark.parametrize(
    "error",
    [
        errors.InternalError("secret-1"),
        ValueError("secret-1"),
        KeyError("secret-1"),
        OSError(2, "secret-1", "secret-1"),
    ],
)
def test_internal_text_never_leaks(error):
    wire = to_wire(error, "my-id")
    assert wire.code is grpc.StatusCode.INTERNAL
    assert wire.message == "internal error; request id my-id"
    assert b"secret-1" not in dict(wire.trailing_metadata)["grpc-status-details-bin"]
    assert detail(wire, error_details_pb2.ErrorInfo).metadata == {}


@pytest.mark.parametrize("text", ["x", "%", "\n", "é", "漢", "😀", "\udc80"])
@pytest.mark.parametrize("count", [10, 900, 100_000])
def test_headers_stay_small_whatever_an_error_repeats(text, count):
    long = text * count
    huge = [
        InvalidArgument.of("image.encoded", long, reason="IMAGE_UNDECODABLE", size=long, more=long),
        InvalidArgument([FieldViolation(f"options.layers[{i}]", long) for i in range(100)]),
        InvalidArgument([FieldViolation(long, long)] * 3, metadata={f"key{i}": long for i in range(100)}),
        ModelNotFound(long, [long] * 3),
        ModelFailed(long, long),
        errors.CompanionFailed(long, long),
        errors.ModelUnloaded(long, "was unloaded"),
        errors.QueueFull(long, metadata={"a": long}, retry_after_s=1.0),
    ]
    for error in huge:
        wire = to_wire(error, "i" * 64)
        assert header_bytes(wire) < HEADERS_BYTES
        assert detail(wire, error_details_pb2.ErrorInfo).reason == error.reason
        if isinstance(error, InvalidArgument):
            assert detail(wire, error_details_pb2.BadRequest).field_violations


def test_what_is_cut_says_so_and_what_fits_is_whole():
    fits, longer = "x" * 1024, "x" * 1025
    assert to_wire(errors.QueueFull(fits), "id").message == fits
    assert to_wire(errors.QueueFull(longer), "id").message == "x" * 1021 + "..."


@pytest.mark.parametrize("kind", EXAMPLES, ids=lambda kind: kind.__name__)
def test_a_status_in_a_stream_is_the_one_that_a_call_ends_with(kind):
    error, code, _ = EXAMPLES[kind]
    status = to_status(error, "id")
    assert status == status_of(to_wire(error, "id"))
    assert status.code == code.value[0]
