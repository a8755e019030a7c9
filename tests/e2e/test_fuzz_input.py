"""Mutated requests against a real server: an answer or the caller's fault, never a fault of the server's."""

from collections.abc import Callable, Iterator

import grpc
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from image_files import ORIENTATION, saved
from messages import Details, distinct, pixels

PHOTO = distinct(1, 16)[0]
GOOD = pb.ExplainRequest(model="tiny", image=pixels(PHOTO))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    return exif


OPTIONS = pb.ExplainOptions(
    method=method_pb2.METHOD_LAYER_CAM,
    class_ids=pb.ClassIds(values=[3, 1]),
    layers=["stem"],
    map_size=pb.MAP_SIZE_INPUT,
    map_type=pb.DATA_TYPE_UINT8,
    top_predictions=2,
)
IMAGES = [
    pixels(PHOTO),
    pb.Image(encoded=saved(PHOTO, "PNG")),
    pb.Image(encoded=saved(Image.fromarray(PHOTO).quantize(5), "PNG", exif=_exif(), transparency=1)),
    pb.Image(encoded=saved(PHOTO, "JPEG", exif=_exif())),
    pb.Image(encoded=saved(PHOTO, "JPEG", progressive=True)),
    pb.Image(encoded=saved(PHOTO, "WEBP")),
    pb.Image(encoded=saved(PHOTO, "WEBP", lossless=True)),
]
VALID = [pb.ExplainRequest(model="tiny", image=image, options=OPTIONS) for image in IMAGES]


@pytest.fixture(scope="module")
def send(server) -> Iterator[Callable[[bytes], grpc.StatusCode]]:
    """Send any bytes as a request; returns the code, once the details of an error are right."""
    with grpc.insecure_channel(server.address, options=[("grpc.enable_retries", 0)]) as channel:
        raw = channel.unary_unary("/heatlens.v1.ExplainService/Explain")
        stub = explain_pb2_grpc.ExplainServiceStub(channel)

        def send(request: bytes) -> grpc.StatusCode:
            call = raw.future(request, timeout=30)
            if call.code() is grpc.StatusCode.OK:
                assert pb.ExplainResponse.FromString(call.result()).explanations
            else:
                details = Details(call)
                assert details.info.domain == "heatlens"
                assert details.fields or call.code() is not grpc.StatusCode.INVALID_ARGUMENT
            return call.code()

        yield send
        assert stub.Explain(GOOD, timeout=30).explanations
        assert psutil.Process(server.process.pid).is_running()


CALLERS_FAULT = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
POSITIONS = st.floats(0, 1, exclude_max=True)


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """A few bytes replaced, removed or added anywhere, and perhaps the end cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = int(draw(POSITIONS) * len(data))
        kind = draw(st.sampled_from(["replace", "flip", "remove", "insert"]))
        if kind == "replace":
            new = draw(st.binary(min_size=1, max_size=4))
            data[at : at + len(new)] = new
        elif kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "remove":
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data[: int(draw(POSITIONS) * len(data))] if draw(st.integers(0, 4)) == 4 else data)


def test_what_is_mutated_is_valid(send):
    assert {send(request.SerializeToString()) for request in VALID} == {grpc.StatusCode.OK}


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_mutated_messages(send, data):
    request = data.draw(st.sampled_from(VALID)).SerializeToString()
    assert send(data.draw(mutated(request))) in CALLERS_FAULT


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_mutated_images_in_whole_messages(send, data):
    image = data.draw(st.sampled_from([image.encoded for image in IMAGES if image.encoded]))
    request = pb.ExplainRequest(model="tiny", image=pb.Image(encoded=data.draw(mutated(image))))
    assert send(request.SerializeToString()) in CALLERS_FAULT
