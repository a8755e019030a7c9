"""From inference requests to queries, and from a query's fields to what a request calls them.

What makes no queries is refused here, with the name of its tensor or parameter; all else is checked as of any query.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TypeVar

import numpy as np

from heatlens_server.api.checks import quoted
from heatlens_server.api.query import Image, MapSize, Options, Query, Tensor
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.transports.grpc.parsing import MOST_FIELDS
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb
from heatlens_server.transports.grpc.v2.responses import OUTPUTS

IMAGE, TARGET_CLASS = "IMAGE", "TARGET_CLASS"
PARAMETERS = ("method", "layer", "top_k", "map_size", "timeout")

_PIXELS = {"UINT8": "UINT8", "UINT16": "UINT16", "FP32": "FLOAT32"}
"""Datatypes of pixels, and what queries call them."""

_NUMBERS = {
    "UINT8": ("uint_contents", "|u1"),
    "UINT16": ("uint_contents", "<u2"),
    "FP32": ("fp32_contents", "<f4"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
}
"""Datatypes of numbers: the field of their contents, and their numpy dtype."""

_DATATYPES = {IMAGE: (*_PIXELS, "BYTES"), TARGET_CLASS: ("INT32", "INT64", "BYTES")}

_E = TypeVar("_E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Inference:
    """What a request asks for.

    Attributes:
        queries: one per image.
        outputs: the names of the tensors that are wanted.
        timeout_s: how long the caller will wait by its parameter, in seconds; None: it does not tell.
    """

    queries: tuple[Query, ...]
    outputs: tuple[str, ...]
    timeout_s: float | None


@dataclass(frozen=True, slots=True)
class _Input:
    """A tensor: of BYTES its elements, of numbers their bytes, as many as its shape says."""

    datatype: str
    shape: tuple[int, ...]
    data: bytes
    texts: Sequence[bytes] = ()


def inference_of(request: pb.ModelInferRequest, *, most_images: int) -> Inference:
    """The queries that a request makes.

    Args:
        request: whose.
        most_images: how many images a request may hold.

    Raises:
        InvalidArgument: a tensor or a parameter is unknown, or is not of its type and shape.
    """
    inputs = _inputs(request)
    if IMAGE not in inputs:
        raise _wrong(IMAGE, "this input is required", reason="IMAGE_MISSING")
    images = _images(inputs[IMAGE], most_images)
    if unknown := [name for name in request.parameters if name not in PARAMETERS]:
        raise _wrong("parameters", f"unknown parameter {quoted(min(unknown))}; known are {', '.join(PARAMETERS)}")
    layer, top_k, timeout_us = _text(request, "layer"), _integer(request, "top_k"), _integer(request, "timeout")
    if timeout_us is not None and timeout_us < 1:
        raise _wrong("parameters.timeout", f"must be 1 or more, in microseconds; got {timeout_us}")
    if top_k is not None and TARGET_CLASS in inputs:
        raise _wrong("parameters.top_k", f"cannot be given together with the input {TARGET_CLASS}")
    options = Options(
        method=_named(request, "method", Method),
        layers=() if layer is None else (layer,),
        top_k=top_k,
        map_size=_named(request, "map_size", MapSize) or MapSize.LAYER,
    )
    each = _with_targets(options, inputs.get(TARGET_CLASS), len(images))
    return Inference(
        tuple(
            Query(request.model_name, image, one, request.model_version, images=len(images))
            for image, one in zip(images, each, strict=True)
        ),
        _outputs(request),
        None if timeout_us is None else timeout_us / 1e6,
    )


def path_of(field: str, image: int | None) -> str:
    """What a request calls a field of a query.

    Args:
        field: as the query has it.
        image: the index of the query's image; None if it is the only one.
    """
    name = field.partition(".")[0].partition("[")[0]
    if name in ("image", "class_ids", "class_labels"):
        return (IMAGE if name == "image" else TARGET_CLASS) + ("" if image is None else f"[{image}]")
    name = "layer" if name == "layers" else name
    return f"parameters.{name}" if name in PARAMETERS else field


def _inputs(request: pb.ModelInferRequest) -> Mapping[str, _Input]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise _wrong("raw_input_contents", f"{len(raw)} for {len(request.inputs)} inputs; must be one for each")
    found: dict[str, _Input] = {}
    for i, sent in enumerate(request.inputs):
        if sent.name not in _DATATYPES:
            raise _wrong("inputs", f"unknown input {quoted(sent.name)}; known are {', '.join(_DATATYPES)}")
        _refuse_parameters(sent.name, sent.parameters)
        if sent.name in found:
            raise _wrong(sent.name, "this input is given twice")
        found[sent.name] = _input(sent, raw[i] if raw else None)
    return found


def _input(sent: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> _Input:
    name, datatype, shape = sent.name, sent.datatype, tuple(sent.shape)
    known = _DATATYPES[name]
    if datatype not in known:
        why = f"the datatype must be {', '.join(known)}; got {quoted(datatype)}"
        raise _wrong(name, why, reason="TENSOR_TYPE_UNSUPPORTED")
    if not 1 <= len(shape) <= 4 or min(shape) < 1:
        shown = list(shape) if len(shape) <= 4 else f"{len(shape)} dimensions"
        raise _wrong(name, f"the shape must be 1 to 4 sides of 1 or more; got {shown}", reason="TENSOR_SIZE_MISMATCH")
    count = math.prod(shape)
    if count > MOST_FIELDS and (datatype == "BYTES" or name == TARGET_CLASS):
        raise _wrong(name, f"at most {MOST_FIELDS} elements; got {count}", reason="MESSAGE_TOO_COMPLEX")
    if datatype == "BYTES":
        texts = list(sent.contents.bytes_contents) if raw is None else _texts(raw, count)
        if len(texts) != count:
            why = f"the shape {list(shape)} of BYTES needs {count} elements, each with its length; got others"
            raise _wrong(name, why, reason="TENSOR_SIZE_MISMATCH")
        return _Input(datatype, shape, b"", texts)
    field, dtype = _NUMBERS[datatype]
    data = _stored(name, getattr(sent.contents, field), dtype) if raw is None else raw
    needed = count * np.dtype(dtype).itemsize
    if len(data) != needed:
        why = f"the shape {list(shape)} of {datatype} needs {needed} bytes; got {len(data)}"
        raise _wrong(name, why, reason="TENSOR_SIZE_MISMATCH")
    return _Input(datatype, shape, data)


def _texts(raw: bytes, count: int) -> list[bytes]:
    """The elements of a raw tensor of BYTES; too few if it is not whole, or holds more."""
    found: list[bytes] = []
    at = 0
    while at < len(raw) and len(found) <= count:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if end > len(raw):
            return []
        found.append(raw[at + 4 : end])
        at = end
    return found


def _stored(name: str, values: Sequence[float], dtype: str) -> bytes:
    sent = np.asarray(values)
    stored = sent.astype(dtype)
    if not np.array_equal(stored, sent, equal_nan=True):
        raise _wrong(name, "an element is out of the range of the datatype")
    return stored.tobytes()


def _images(sent: _Input, most: int) -> list[Image]:
    shape = sent.shape
    is_batch = sent.datatype == "BYTES" or len(shape) == 4
    count = shape[0] if is_batch else 1
    if count > most:
        raise _wrong(IMAGE, f"at most {most} images in one request; got {count}")
    if sent.datatype == "BYTES":
        if math.prod(shape) != count:
            why = f"the shape of BYTES must be [N] or [N, 1]; got {list(shape)}"
            raise _wrong(IMAGE, why, reason="TENSOR_SIZE_MISMATCH")
        return [Image(encoded=file) for file in sent.texts]
    size, data_type = len(sent.data) // count, _PIXELS[sent.datatype]
    sides = shape[1:] if is_batch else shape
    return [Image(pixels=Tensor(data_type, sides, sent.data[i * size : (i + 1) * size])) for i in range(count)]


def _with_targets(options: Options, sent: _Input | None, count: int) -> list[Options]:
    """The options of each image: all have as many targets."""
    if sent is None:
        return [options] * count
    if sent.shape[0] != count or len(sent.shape) > 2:
        why = f"the shape must be [{count}] or [{count}, K], as there are {count} images; got {list(sent.shape)}"
        raise _wrong(TARGET_CLASS, why, reason="TENSOR_SIZE_MISMATCH")
    if sent.datatype == "BYTES":
        # What is no UTF-8 is no label: the error that lists near ones says so.
        labels = [text.decode(errors="replace") for text in sent.texts]
        size = len(labels) // count
        rows = [tuple(labels[i * size : (i + 1) * size]) for i in range(count)]
        return [replace(options, class_ids=ClassIds(()), class_labels=row) for row in rows]
    ids = np.frombuffer(sent.data, _NUMBERS[sent.datatype][1]).reshape(count, -1).tolist()
    return [replace(options, class_ids=ClassIds(tuple(row))) for row in ids]


def _outputs(request: pb.ModelInferRequest) -> tuple[str, ...]:
    names = [wanted.name for wanted in request.outputs]
    for wanted in request.outputs:
        if wanted.name not in OUTPUTS:
            raise _wrong("outputs", f"unknown output {quoted(wanted.name)}; known are {', '.join(OUTPUTS)}")
        _refuse_parameters(wanted.name, wanted.parameters)
    if len(set(names)) < len(names):
        raise _wrong("outputs", "an output is named twice")
    return tuple(names) or tuple(OUTPUTS)


def _refuse_parameters(tensor: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    """Those of shared memory, of Triton's classification and all others: without a word they would be wrong."""
    if parameters:
        raise _wrong(tensor, f"the parameter {quoted(min(parameters))} of a tensor is not supported")


def _value(request: pb.ModelInferRequest, name: str) -> object:
    if name not in request.parameters:
        return None
    sent = request.parameters[name]
    choice = sent.WhichOneof("parameter_choice")
    return "" if choice is None else getattr(sent, choice)


def _text(request: pb.ModelInferRequest, name: str) -> str | None:
    value = _value(request, name)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(f"parameters.{name}", f"must be a text; got {value}")


def _integer(request: pb.ModelInferRequest, name: str) -> int | None:
    value = _value(request, name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise _wrong(f"parameters.{name}", f"must be a whole number; got {quoted(str(value))}")


def _named(request: pb.ModelInferRequest, name: str, ours: type[_E]) -> _E | None:
    value = _text(request, name)
    if value is None:
        return None
    if value not in tuple(ours):
        raise _wrong(f"parameters.{name}", f"unknown: {quoted(value)}; known are {', '.join(ours)}")
    return ours(value)


def _wrong(field: str, description: str, *, reason: str = "INVALID_OPTION") -> InvalidArgument:
    return InvalidArgument.of(field, description, reason=reason)
