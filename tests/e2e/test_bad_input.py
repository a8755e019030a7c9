"""Bad input gets the right answer, and the next caller gets a good one. Raw stubs against a real server process."""

import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from image_files import black_png, png, saved
from messages import Details, distinct, map_of, pixels

MAX_MESSAGE_BYTES = 8_388_608
PHOTO = distinct(1)[0]
GOOD = pb.ExplainRequest(model="tiny", image=pixels(PHOTO))
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


@pytest.fixture(scope="module")
def stub(server) -> Iterator[explain_pb2_grpc.ExplainServiceStub]:
    """A stub without retries and without limits of its own."""
    options = [("grpc.enable_retries", 0), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.address, options=options) as channel:
        yield explain_pb2_grpc.ExplainServiceStub(channel)


def failure(stub: explain_pb2_grpc.ExplainServiceStub, request: pb.ExplainRequest) -> grpc.RpcError:
    """The error of a request; after it the server must answer a good one."""
    with pytest.raises(grpc.RpcError) as raised:
        stub.Explain(request, timeout=30)
    assert stub.Explain(GOOD, timeout=30).explanations
    return raised.value


def refusal(stub, request, *, reason: str, fields: list[str], code: grpc.StatusCode = INVALID) -> Details:
    error = failure(stub, request)
    details = Details(error)
    assert (error.code(), details.info.reason, details.info.domain) == (code, reason, "heatlens")
    assert details.fields == fields
    assert details.message == error.details()
    assert all(violation.description for violation in details.bad_request.field_violations)
    assert not details.has_retry  # it would be wrong again
    return details


def file(encoded: bytes) -> pb.ExplainRequest:
    return pb.ExplainRequest(model="tiny", image=pb.Image(encoded=encoded))


def tensor(shape, data: bytes, data_type: int = pb.DATA_TYPE_UINT8) -> pb.ExplainRequest:
    return pb.ExplainRequest(image=pb.Image(pixels=pb.Tensor(data_type=data_type, shape=shape, data=data)))


def asking(model: str = "tiny", **options) -> pb.ExplainRequest:
    return pb.ExplainRequest(model=model, image=GOOD.image, options=pb.ExplainOptions(**options))


def ids(*values: int) -> pb.ClassIds:
    return pb.ClassIds(values=values)


JPEG, PNG, WEBP = (saved(PHOTO, file_format) for file_format in ("JPEG", "PNG", "WEBP"))
# Of every kind of damage (tests/unit/imaging/test_decode.py has all) one, and those of whole files that lie.
FILES = {
    "empty": b"",
    "ico": saved(PHOTO, "ICO"),
    "jpeg cut in half": JPEG[: len(JPEG) // 2],
    "webp cut in half": WEBP[: len(WEBP) // 2],
    "png with a wrong checksum": PNG[:-20] + b"\xff" + PNG[-19:],
    "png with right checksums around cut pixels": png(64, 64, b"\x78\x9c\x63\x60"),
    "png of no width": png(0, 64, b"\x78\x9c\x63\x60"),
    "another header on the pixels": b"RIFF" + PNG[4:],
}


@pytest.mark.parametrize("encoded", FILES.values(), ids=FILES)
def test_files_that_are_no_whole_image(stub, encoded):
    refusal(stub, file(encoded), reason="IMAGE_UNDECODABLE", fields=["image.encoded"])


@pytest.mark.parametrize("image", [None, pb.Image()], ids=["no image", "no source"])
def test_an_image_is_required(stub, image):
    refusal(stub, pb.ExplainRequest(image=image), reason="IMAGE_MISSING", fields=["image"])


@pytest.mark.serial
def test_a_bomb_is_refused_before_it_is_decoded(server, stub):
    width_px, height_px = 10_000, 10_001
    bomb = black_png(width_px, height_px)
    assert len(bomb) < 1_000_000
    process = psutil.Process(server.process.pid)
    # The kernel's high-water mark, which no short-lived buffer escapes.
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before_bytes = process.memory_info().rss
    started_at = time.monotonic()
    details = refusal(stub, file(bomb), reason="IMAGE_TOO_LARGE", fields=["image.encoded"])
    assert time.monotonic() - started_at < 2
    assert details.info.metadata["max_pixels"] == "64000000"
    status = Path(f"/proc/{process.pid}/status").read_text()
    (peak_kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    assert peak_kib * 1024 - before_bytes < width_px * height_px // 4


# tests/unit/imaging/test_decode.py has the others.
SHAPES = {
    "rank 9000": ([1] * 9_000, 1),
    "channels first": ([3, 64, 64], 64 * 64 * 3),
    "negative": ([-64, 64, 3], 64 * 64 * 3),
    "smallest int64": ([-(2**63), 1, 3], 0),
}


@pytest.mark.parametrize(("shape", "size_bytes"), SHAPES.values(), ids=SHAPES)
def test_shapes_that_are_no_image(stub, shape, size_bytes):
    refusal(stub, tensor(shape, bytes(size_bytes)), reason="TENSOR_SIZE_MISMATCH", fields=["image.pixels.shape"])


@pytest.mark.parametrize(
    "shape",
    [
        [2**62, 4, 3],  # 2**64 wraps to 0 in 64 bits
        [8001, 8000, 3],
        [2_000_000, 1, 3],
    ],
)
def test_shapes_of_too_many_pixels(stub, shape):
    refusal(stub, tensor(shape, b""), reason="IMAGE_TOO_LARGE", fields=["image.pixels.shape"])


@pytest.mark.parametrize("size_bytes", [0, 64 * 64 * 3 - 1, 64 * 64 * 3 + 1, 64 * 64 * 3 * 4])
def test_bytes_that_do_not_match_the_shape(stub, size_bytes):
    details = refusal(
        stub, tensor([64, 64, 3], bytes(size_bytes)), reason="TENSOR_SIZE_MISMATCH", fields=["image.pixels.data"]
    )
    assert details.info.metadata == {"expected_bytes": str(64 * 64 * 3), "actual_bytes": str(size_bytes)}


@pytest.mark.parametrize("data_type", [pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_FLOAT16, 99, -1])
def test_pixels_of_other_types(stub, data_type):
    refusal(
        stub,
        tensor([64, 64, 3], bytes(64 * 64 * 3), data_type),
        reason="TENSOR_TYPE_UNSUPPORTED",
        fields=["image.pixels.data_type"],
    )


# tests/unit/api/test_validation_of_anything.py has the range of every field; these are huge, or of several models.
OPTIONS = {
    "17 class ids": (asking("efficientnet_lite0", class_ids=ids(*range(17))), ["options.class_ids.values"]),
    "nine thousand class ids": (asking(class_ids=ids(*[1] * 9_000)), ["options.class_ids.values"]),
    "top_k over max_targets": (asking("efficientnet_lite0", top_k=17), ["options.top_k"]),
    "layer of another model": (asking("tiny_mlp", layers=["stem"]), ["options.layers[0]"]),
    "nine thousand layers": (asking(layers=["body"] * 9_000), ["options.layers"]),
    "layer of emoji": (asking(layers=["\N{CAT FACE}" * 9999, "body"]), ["options.layers[0]"]),
    "CAM of a model with a hidden layer": (asking("tiny_mlp", method=method_pb2.METHOD_CAM), ["options.method"]),
    "unknown target score": (asking(target_score=9), ["options.target_score"]),
    "mask for a classifier": (asking(mask=pb.Tensor()), ["options.mask"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "request_", [asking(class_ids=ids(*[1] * 1_000_000)), asking(layers=["body"] * 100_000)], ids=["classes", "layers"]
)
def test_messages_of_more_parts_than_any_needs(stub, request_):
    refusal(stub, request_, reason="MESSAGE_TOO_COMPLEX", fields=[""])


@pytest.mark.parametrize(("request_", "fields"), OPTIONS.values(), ids=OPTIONS)
def test_options_out_of_range(stub, request_, fields):
    refusal(stub, request_, reason="INVALID_OPTION", fields=fields)


def test_all_wrong_fields_are_named_at_once(stub):
    wrong = tensor([64, 64, 3], b"x")
    wrong.options.CopyFrom(pb.ExplainOptions(method=99, layers=["nope"], top_k=0, map_type=42, top_predictions=-1))
    fields = ["method", "layers[0]", "top_k", "map_type", "top_predictions"]
    details = refusal(
        stub, wrong, reason="INVALID_OPTION", fields=[*(f"options.{name}" for name in fields), "image.pixels.data"]
    )
    for field in details.fields:
        assert field in details.message


@pytest.mark.parametrize("name", ["nope", "TINY", "tiny\n", "../tiny", "x" * 100_000, "\N{CAT FACE}" * 25_000])
def test_unknown_model(stub, name):
    details = refusal(
        stub, pb.ExplainRequest(model=name, image=GOOD.image), code=NOT_FOUND, reason="MODEL_NOT_FOUND", fields=[]
    )
    assert details.resource.resource_type == "heatlens.v1.Model"
    assert details.resource.resource_name == name[:80]
    assert details.info.metadata["available"] == "tiny,tiny_mlp,broken,efficientnet_lite0"


def large(height_px: int, map_type: int, *, width_px: int = 2048, top_k: int = 1) -> pb.ExplainRequest:
    request = file(black_png(width_px, height_px))
    request.options.CopyFrom(pb.ExplainOptions(map_size=pb.MAP_SIZE_SOURCE, map_type=map_type, top_k=top_k))
    return request


@pytest.mark.parametrize(
    ("largest_height_px", "map_type", "top_k"),
    [(1016, pb.DATA_TYPE_FLOAT32, 1), (2032, pb.DATA_TYPE_FLOAT16, 1), (1016, pb.DATA_TYPE_UINT8, 4)],
)
def test_answer_that_would_not_fit_in_a_message(stub, largest_height_px, map_type, top_k):
    # 1016 * 2048 * 4 bytes and 64 KiB for everything else are exactly MAX_MESSAGE_BYTES.
    answer = stub.Explain(large(largest_height_px, map_type, top_k=top_k), timeout=30)
    assert len(answer.explanations) == top_k
    assert list(answer.explanations[0].map.shape) == [largest_height_px, 2048]
    assert MAX_MESSAGE_BYTES - 100_000 < answer.ByteSize() <= MAX_MESSAGE_BYTES
    details = refusal(
        stub,
        large(largest_height_px + 1, map_type, top_k=top_k),
        reason="ANSWER_TOO_LARGE",
        fields=["options.map_size"],
    )
    assert int(details.info.metadata["answer_bytes"]) > int(details.info.metadata["max_message_bytes"])


def padded(size_bytes: int) -> pb.ExplainRequest:
    """A good request of exactly this size: decoders stop at the end of the PNG."""
    request = file(PNG + bytes(size_bytes - 100 - len(PNG)))
    request.image.encoded += bytes(size_bytes - request.ByteSize())
    assert request.ByteSize() == size_bytes
    return request


def test_message_that_is_too_large(stub):
    assert stub.Explain(padded(MAX_MESSAGE_BYTES), timeout=30).explanations
    error = failure(stub, padded(MAX_MESSAGE_BYTES + 1))
    # The channel refuses it before any code of ours: no details.
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(MAX_MESSAGE_BYTES) in error.details()


def test_bad_requests_do_not_harm_good_ones_at_the_same_time(stub):
    images = distinct(8)
    alone = [stub.Explain(pb.ExplainRequest(image=pixels(image)), timeout=30) for image in images]
    bad = [file(FILES["jpeg cut in half"]), asking(top_k=0), tensor([1], b""), asking("nope")]
    refused = [stub.Explain.future(bad[i % 4], timeout=30) for i in range(32)]
    answered = [stub.Explain.future(pb.ExplainRequest(image=pixels(image)), timeout=30) for image in images]
    refused += [stub.Explain.future(bad[i % 4], timeout=30) for i in range(32)]
    for one, other in zip(alone, answered, strict=True):
        np.testing.assert_allclose(map_of(one.explanations[0]), map_of(other.result().explanations[0]), atol=1e-5)
    assert {call.code() for call in refused} == {INVALID, NOT_FOUND}
