"""From inference requests to queries: every form of a tensor, and what each wrong one is told."""

import numpy as np
import pytest

from heatlens_server.api.query import Image, MapSize, Options, Query, Tensor
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.transports.grpc.parsing import parsed, tolerant
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb
from heatlens_server.transports.grpc.v2.requests import inference_of, path_of

PIXELS = bytes(range(12))
MOST = 4

Input = pb.ModelInferRequest.InferInputTensor


def raw_texts(*texts):
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def asked(*tensors, outputs=(), **parameters):
    """What a request with raw tensors makes: name, datatype, shape, data."""
    request = pb.ModelInferRequest(
        model_name="m",
        model_version="7",
        inputs=[Input(name=name, datatype=datatype, shape=shape) for name, datatype, shape, _ in tensors],
        outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs],
        raw_input_contents=[data for *_, data in tensors],
    )
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return inference_of(request, most_images=MOST)


def unpacked(datatype, shape, name="IMAGE", **contents):
    """The same, of one tensor whose elements are not raw."""
    sent = Input(name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents))
    return inference_of(pb.ModelInferRequest(inputs=[sent]), most_images=MOST)


def targets(*tensors, count=1, **parameters):
    found = asked(("IMAGE", "BYTES", [count], raw_texts(*[b"file"] * count)), *tensors, **parameters)
    return [(query.options.class_ids, query.options.class_labels) for query in found.queries]


ONE = ("IMAGE", "UINT8", [2, 2, 3], PIXELS)


def test_an_image_alone_asks_for_the_defaults_and_everything():
    found = asked(ONE)
    assert found.queries == (Query("m", Image(pixels=Tensor("UINT8", (2, 2, 3), PIXELS)), Options(), "7"),)
    assert (found.outputs, found.timeout_s) == (("MAP", "CLASS_ID", "SCORE", "LABEL"), None)


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "images"),
    [
        ("UINT8", [1, 2, 2, 3], PIXELS, [("UINT8", (2, 2, 3), PIXELS)]),
        ("UINT8", [2, 2], PIXELS[:4], [("UINT8", (2, 2), PIXELS[:4])]),
        ("UINT16", [1, 2, 3], PIXELS, [("UINT16", (1, 2, 3), PIXELS)]),
        ("FP32", [1, 1, 3], PIXELS, [("FLOAT32", (1, 1, 3), PIXELS)]),
        (
            "UINT8",
            [2, 1, 2, 3],
            PIXELS,
            [("UINT8", (1, 2, 3), PIXELS[:6]), ("UINT8", (1, 2, 3), PIXELS[6:])],
        ),
    ],
)
def test_pixels(datatype, shape, data, images):
    found = asked(("IMAGE", datatype, shape, data)).queries
    assert [query.image for query in found] == [Image(pixels=Tensor(*image)) for image in images]
    assert {query.images for query in found} == {len(images)}


@pytest.mark.parametrize("shape", [[2], [2, 1]])
def test_files(shape):
    files = [Image(encoded=b"one"), Image(encoded=b"")]
    assert [query.image for query in asked(("IMAGE", "BYTES", shape, raw_texts(b"one", b""))).queries] == files
    assert [query.image for query in unpacked("BYTES", shape, bytes_contents=[b"one", b""]).queries] == files


def test_elements_that_are_not_raw():
    (query,) = unpacked("UINT8", [2, 2, 3], uint_contents=PIXELS).queries
    assert query.image == Image(pixels=Tensor("UINT8", (2, 2, 3), PIXELS))
    (query,) = unpacked("UINT16", [1, 1], uint_contents=[65_535]).queries
    assert query.image.pixels.data == b"\xff\xff"
    (query,) = unpacked("FP32", [1, 2], fp32_contents=[0.1, float("nan")]).queries
    assert query.image.pixels.data == np.array([0.1, np.nan], "<f4").tobytes()


def test_targets():
    ids = np.array([5, 7])
    assert targets(("TARGET_CLASS", "INT64", [1], ids[:1].tobytes())) == [(ClassIds((5,)), ())]
    assert targets(("TARGET_CLASS", "INT32", [1, 2], ids.astype("<i4").tobytes())) == [(ClassIds((5, 7)), ())]
    assert targets(("TARGET_CLASS", "INT64", [2], ids.tobytes()), count=2) == [(ClassIds((i,)), ()) for i in (5, 7)]
    texts = raw_texts(b"cat", b"dog", b"\xff", "Bär".encode())
    assert targets(("TARGET_CLASS", "BYTES", [2, 2], texts), count=2) == [
        (ClassIds(()), ("cat", "dog")),
        (ClassIds(()), ("�", "Bär")),
    ]


def test_parameters():
    found = asked(ONE, outputs=["SCORE"], method="layer-cam", layer="bn2", top_k=3, map_size="input", timeout=2_000)
    assert found.queries[0].options == Options(
        method=Method.LAYER_CAM, layers=("bn2",), top_k=3, map_size=MapSize.INPUT
    )
    assert (found.outputs, found.timeout_s) == (("SCORE",), 0.002)


@pytest.mark.parametrize(
    ("tensors", "extra", "field", "reason", "said"),
    [
        ([], {}, "IMAGE", "IMAGE_MISSING", "required"),
        ([("PIXELS", "UINT8", [1], b"0")], {}, "inputs", "INVALID_OPTION", "unknown input 'PIXELS'; known are IMAGE"),
        ([ONE, ONE], {}, "IMAGE", "INVALID_OPTION", "twice"),
        ([("IMAGE", "FP64", [1, 1, 3], bytes(24))], {}, "IMAGE", "TENSOR_TYPE_UNSUPPORTED", "UINT8, UINT16, FP32, BYT"),
        ([("IMAGE", "UINT8", [2, 2, 3], PIXELS[:-1])], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "12 bytes; got 11"),
        ([("IMAGE", "UINT8", [], b"0")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "1 to 4 sides"),
        ([("IMAGE", "UINT8", [1] * 5, b"0")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "5 dimensions"),
        ([("IMAGE", "UINT8", [-1, -1, 3], b"000")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "of 1 or more"),
        ([("IMAGE", "UINT8", [2**62, 0, 2, 3], b"")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "of 1 or more"),
        ([("IMAGE", "UINT8", [2**62] * 4, b"")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "bytes; got 0"),
        ([("IMAGE", "UINT8", [5, 1, 1, 3], bytes(15))], {}, "IMAGE", "INVALID_OPTION", "at most 4 images"),
        ([("IMAGE", "BYTES", [5], raw_texts(*[b""] * 5))], {}, "IMAGE", "INVALID_OPTION", "at most 4 images"),
        ([("IMAGE", "BYTES", [2**40], bytes(1 << 20))], {}, "IMAGE", "MESSAGE_TOO_COMPLEX", "at most 10000"),
        ([("IMAGE", "BYTES", [1, 2], raw_texts(b"", b""))], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "[N] or [N, 1]"),
        ([("IMAGE", "BYTES", [1], raw_texts(b"", b""))], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "needs 1 elements"),
        ([("IMAGE", "BYTES", [2], raw_texts(b"x"))], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "needs 2 elements"),
        ([("IMAGE", "BYTES", [1], b"\xff\xff\xff\xffx")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "needs 1 elements"),
        ([("IMAGE", "BYTES", [1], b"\x01\x00")], {}, "IMAGE", "TENSOR_SIZE_MISMATCH", "needs 1 elements"),
        ([ONE, ("TARGET_CLASS", "UINT8", [1], b"0")], {}, "TARGET_CLASS", "TENSOR_TYPE_UNSUPPORTED", "INT32"),
        ([ONE, ("TARGET_CLASS", "INT32", [2], bytes(8))], {}, "TARGET_CLASS", "TENSOR_SIZE_MISMATCH", "[1] or [1, K]"),
        ([ONE, ("TARGET_CLASS", "INT32", [1, 20_000], b"")], {}, "TARGET_CLASS", "MESSAGE_TOO_COMPLEX", "10000"),
        ([ONE, ("TARGET_CLASS", "INT32", [1], bytes(4))], {"top_k": 1}, "parameters.top_k", "INVALID_OPTION", "TARGET"),
        (
            [ONE],
            {"sequence_id": 1},
            "parameters",
            "INVALID_OPTION",
            "unknown parameter 'sequence_id'; known are method",
        ),
        ([ONE], {"method": "nope"}, "parameters.method", "INVALID_OPTION", "unknown: 'nope'; known are cam, grad-cam"),
        ([ONE], {"method": 1}, "parameters.method", "INVALID_OPTION", "must be a text"),
        ([ONE], {"map_size": "huge"}, "parameters.map_size", "INVALID_OPTION", "known are layer, input, source"),
        ([ONE], {"top_k": True}, "parameters.top_k", "INVALID_OPTION", "must be a whole number"),
        ([ONE], {"top_k": 1.0}, "parameters.top_k", "INVALID_OPTION", "must be a whole number"),
        ([ONE], {"timeout": 0}, "parameters.timeout", "INVALID_OPTION", "in microseconds"),
        ([ONE], {"outputs": ["HEAT"]}, "outputs", "INVALID_OPTION", "unknown output 'HEAT'; known are MAP, CLASS_ID"),
        ([ONE], {"outputs": ["MAP", "MAP"]}, "outputs", "INVALID_OPTION", "twice"),
    ],
)
def test_what_is_wrong_is_named(tensors, extra, field, reason, said):
    with pytest.raises(InvalidArgument) as raised:
        asked(*tensors, **extra)
    (violation,) = raised.value.violations
    assert (violation.field, raised.value.reason) == (field, reason)
    assert said in violation.description


@pytest.mark.parametrize(
    ("datatype", "contents", "said"),
    [("UINT8", {"uint_contents": [256]}, "out of the range"), ("UINT8", {"int_contents": [1]}, "1 bytes; got 0")],
)
def test_elements_that_do_not_fit(datatype, contents, said):
    with pytest.raises(InvalidArgument, match=said):
        unpacked(datatype, [1, 1], **contents)


@pytest.mark.parametrize(
    "bomb",
    [
        pb.ModelInferRequest(inputs=[Input(contents=pb.InferTensorContents(uint_contents=bytes(20_000)))]),
        pb.ModelInferRequest(inputs=[Input(contents=pb.InferTensorContents(bytes_contents=[b""] * 20_000))]),
        pb.ModelInferRequest(inputs=[Input(shape=[1] * 20_000)]),
        pb.ModelInferRequest(inputs=[Input()] * 20_000),
        pb.ModelInferRequest(raw_input_contents=[b""] * 20_000),
        pb.ModelInferRequest(parameters={str(i): pb.InferParameter() for i in range(10_000)}),
    ],
    ids=["numbers", "texts", "shape", "inputs", "raw", "parameters"],
)
def test_messages_of_many_elements_are_refused_unparsed(bomb):
    with pytest.raises(InvalidArgument) as raised:
        parsed(tolerant(pb.ModelInferRequest.FromString)(bomb.SerializeToString()))
    assert raised.value.reason == "MESSAGE_TOO_COMPLEX"


def test_all_tensors_are_raw_or_none():
    request = pb.ModelInferRequest(inputs=[Input(name="IMAGE")], raw_input_contents=[b"", b""])
    with pytest.raises(InvalidArgument, match="raw_input_contents: 2 for 1 inputs"):
        inference_of(request, most_images=MOST)


def test_shared_memory_and_classification_are_refused_by_name():
    request = pb.ModelInferRequest(inputs=[Input(name="IMAGE")])
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    with pytest.raises(InvalidArgument, match="IMAGE: the parameter 'shared_memory_region' of a tensor"):
        inference_of(request, most_images=MOST)
    request = pb.ModelInferRequest(
        inputs=[Input(name="IMAGE", datatype="BYTES", shape=[1])], raw_input_contents=[raw_texts(b"x")]
    )
    request.outputs.add(name="SCORE").parameters["classification"].int64_param = 3
    with pytest.raises(InvalidArgument, match="SCORE: the parameter 'classification' of a tensor"):
        inference_of(request, most_images=MOST)


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("image", "IMAGE[2]"),
        ("image.pixels.shape", "IMAGE[2]"),
        ("class_ids.ids[1]", "TARGET_CLASS[2]"),
        ("class_labels[0]", "TARGET_CLASS[2]"),
        ("layers[0]", "parameters.layer"),
        ("top_k", "parameters.top_k"),
        ("map_size", "parameters.map_size"),
        ("reference_embedding", "reference_embedding"),
        ("", ""),
    ],
)
def test_errors_name_what_a_request_has(field, path):
    assert path_of(field, 2) == path
    assert path_of(field, None) == path.removesuffix("[2]")
