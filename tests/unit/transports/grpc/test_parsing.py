"""Messages that cost far more to parse than to send are refused before protobuf sees them."""

import sys

import pytest
from grpc_health.v1 import health_pb2

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.transports.grpc.parsing import MOST_FIELDS, MOST_TEXT_BYTES, parsed, tolerant


def field(number: int, content: bytes) -> bytes:
    size, rest = b"", len(content)
    while rest >= 0x80:
        size, rest = size + bytes([rest & 0x7F | 0x80]), rest >> 7
    return bytes([number << 3 | 2]) + size + bytes([rest]) + content


MANY = 1_000_000
BOMBS = {
    "unknown numbers": b"\x78\x01" * MANY,
    "unknown lengths": field(15, b"") * MANY,
    "unknown groups": b"\x7b\x7c" * MANY,
    "the same message": field(2, b"") * MANY,
    "texts": field(3, field(4, b"") * MANY),
    "labels": field(3, field(3, field(2, b"") * MANY)),
    "packed numbers": field(3, field(3, field(1, b"\x01" * MANY))),
    "unpacked numbers": field(3, field(3, b"\x08\x01" * MANY)),
    "enums": field(3, field(11, field(1, b"\x01" * MANY))),
    "a shape": field(2, field(2, field(2, b"\x01" * MANY))),
    "long text": field(1, b"m" * (MOST_TEXT_BYTES + 1)),
    "long texts": field(3, field(4, b"l" * MOST_TEXT_BYTES) + field(4, b"l")),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_bombs_never_reach_protobuf(bomb):
    class Message:
        DESCRIPTOR = pb.ExplainRequest.DESCRIPTOR

        @classmethod
        def FromString(cls, data):
            raise AssertionError("parsed")

    with pytest.raises(InvalidArgument) as raised:
        parsed(tolerant(Message.FromString)(bomb))
    assert raised.value.reason == "MESSAGE_TOO_COMPLEX"


def test_large_images_and_many_classes_are_no_bombs():
    request = pb.ExplainRequest(
        model="m" * 1000,
        image=pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[2000, 2000, 3], data=bytes(12_000_000))),
        options=pb.ExplainOptions(
            class_ids=pb.ClassIds(values=range(1000), labels=[f"label {i}" for i in range(1000)]),
            layers=[f"blocks.{i}" for i in range(1000)],
            reference_embedding=pb.Tensor(shape=[1 << 20], data=bytes(4 << 20)),
            min_score=0.5,
        ),
    )
    assert parsed(tolerant(pb.ExplainRequest.FromString)(request.SerializeToString())) == request


def test_the_limit_itself_is_allowed():
    request = field(15, b"") * MOST_FIELDS
    assert parsed(tolerant(pb.ExplainRequest.FromString)(request)).ByteSize() == len(request)
    with pytest.raises(InvalidArgument):
        parsed(tolerant(pb.ExplainRequest.FromString)(request + field(15, b"")))


def test_fields_of_newer_clients_are_let_through():
    newer = field(15, bytes(2 * MOST_TEXT_BYTES)) + b"\x79" + bytes(8) + b"\x7d" + bytes(4)
    assert parsed(tolerant(pb.ExplainRequest.FromString)(newer)).ByteSize() == len(newer)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff",
        b"\x0a\xff",
        b"\x0a\x02\xc3\x28",
        b"\x0f",
        b"\x7c",
        b"\x7b",
        b"\x09\x00",
        b"\x08" + b"\x80" * 11,
        field(2, b"\x0a\x05"),
    ],
    ids=["tag", "length", "utf-8", "wire type", "group's end", "group", "short", "overlong", "behind its end"],
)
def test_what_is_no_message_is_undecodable(garbage):
    with pytest.raises(InvalidArgument) as raised:
        parsed(tolerant(pb.ExplainRequest.FromString)(garbage))
    assert raised.value.reason == "MESSAGE_UNDECODABLE"


def test_an_empty_message_is_one():
    parse = tolerant(health_pb2.HealthCheckRequest.FromString)
    assert parsed(parse(b"")) == health_pb2.HealthCheckRequest()


def test_what_is_refused_is_not_kept():
    bomb = BOMBS["texts"]
    before = sys.getrefcount(bomb)
    error = tolerant(pb.ExplainRequest.FromString)(bomb)
    assert isinstance(error, InvalidArgument)
    assert sys.getrefcount(bomb) == before
