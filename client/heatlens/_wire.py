"""Between values and protobuf: pure functions that build requests and read answers. `_status` reads errors.

A method's name is its enum value's name without the prefix, in lower case, with hyphens; map sizes, map types and
model states go by the same rule. `_names` is the one place where that rule is.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from heatlens._arguments import checked_int, is_text, number_of
from heatlens._exceptions import InternalError, InvalidArgumentError
from heatlens._geometry import Float32Array, PixelBox
from heatlens._images import ImageSource, load_image
from heatlens._results import (
    ClassScore,
    Explanation,
    Health,
    Heatmap,
    ModelInfo,
    ModelState,
    Result,
    ServerInfo,
    Timing,
)
from heatlens.v1 import explain_pb2, method_pb2, model_pb2

MapSizeName = Literal["layer", "input", "source"]
MapTypeName = Literal["float32", "float16", "uint8"]


def _names(items: Iterable[tuple[str, int]], prefix: str) -> dict[str, int]:
    """Return an enum's values by public name; the zero value has none."""
    return {name.removeprefix(prefix).lower().replace("_", "-"): number for name, number in items if number}


METHODS = _names(method_pb2.Method.items(), "METHOD_")
MAP_SIZES = _names(explain_pb2.MapSize.items(), "MAP_SIZE_")
MAP_TYPES = _names(explain_pb2.DataType.items(), "DATA_TYPE_")
OVERFLOW_POLICIES = _names(explain_pb2.OverflowPolicy.items(), "OVERFLOW_POLICY_")
_METHOD_NAMES = {number: name for name, number in METHODS.items()}
_MODEL_STATES = {number: ModelState(name) for name, number in _names(model_pb2.Model.State.items(), "STATE_").items()}
_ELEMENT_TYPES: dict[int, np.dtype[Any]] = {
    explain_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    explain_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    explain_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
}


def explain_request(
    image: ImageSource,
    *,
    model: str | None = None,
    top_k: int | None = None,
    class_ids: int | Sequence[int] | None = None,
    method: str | None = None,
    layers: str | Sequence[str] | None = None,
    map_size: str | None = None,
    map_type: str | None = None,
    top_predictions: int | None = None,
) -> explain_pb2.ExplainRequest:
    """Build the request for `Client.explain`, which documents the arguments. Reads the file if the image is a path.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
        FileNotFoundError: there is no such file (another OSError if it cannot be read).
    """
    options = explain_options(
        top_k=top_k,
        class_ids=class_ids,
        method=method,
        layers=layers,
        map_size=map_size,
        map_type=map_type,
        top_predictions=top_predictions,
    )
    request = explain_pb2.ExplainRequest(model=model_name(model), options=options)
    fill_image(request.image, load_image(image))
    return request


def explain_options(
    *,
    top_k: int | None,
    class_ids: int | Sequence[int] | None,
    method: str | None,
    layers: str | Sequence[str] | None,
    map_size: str | None,
    map_type: str | None,
    top_predictions: int | None,
) -> explain_pb2.ExplainOptions:
    """Build what `explain` and `stream` have in common. `Client.explain` documents the arguments.

    Raises:
        InvalidArgumentError: an argument is wrong; names it.
    """
    if top_k is not None and class_ids is not None:
        raise InvalidArgumentError.of("class_ids", "cannot be combined with top_k: give one of the two")
    options = explain_pb2.ExplainOptions(
        method=number_of("method", method, METHODS),
        layers=_layer_names(layers),
        map_size=number_of("map_size", map_size, MAP_SIZES),
        map_type=number_of("map_type", map_type, MAP_TYPES),
        top_predictions=0 if top_predictions is None else checked_int("top_predictions", top_predictions, at_least=0),
    )
    if top_k is not None:
        options.top_k = checked_int("top_k", top_k, at_least=1)
    if class_ids is not None:
        options.class_ids.values.extend(_class_ids(class_ids))
    return options


def check_size(request: Message, max_message_bytes: int, *, argument: str = "image") -> None:
    """Refuse a request that no channel would carry: gRPC would only find out after burning every retry.

    Raises:
        InvalidArgumentError: the request is larger than the limit.
    """
    size_bytes = request.ByteSize()
    if size_bytes > max_message_bytes:
        raise InvalidArgumentError.of(
            argument,
            f"the request has {size_bytes} bytes, max_message_bytes is {max_message_bytes}; "
            "send the encoded file, or a smaller image",
            reason="MESSAGE_TOO_LARGE",
        )


def health_request(model: str | None) -> health_pb2.HealthCheckRequest:
    """Build the health question about the server (None) or one model.

    Raises:
        InvalidArgumentError: the model is no name.
    """
    name = model_name(model)
    return health_pb2.HealthCheckRequest(service="" if model is None else f"heatlens.v1.ExplainService/{name}")


def result_of(response: explain_pb2.ExplainResponse, *, placed: bool) -> Result:
    """Read an answer. `placed`: whether maps of the source image's size were asked for.

    Raises:
        InternalError: the answer breaks the contract (reason INVALID_RESPONSE).
    """
    box = response.source_region
    region = PixelBox(box.left, box.top, box.right, box.bottom)
    size = (response.source_width_px, response.source_height_px)
    source_size = size if min(size) > 0 else None
    return Result(
        explanations=tuple(
            Explanation(
                class_id=item.class_id,
                label=item.label,
                logit=item.logit,
                probability=item.probability,
                heatmap=Heatmap(
                    values=map_values(item.map),
                    scale=item.map_scale,
                    offset=item.map_offset,
                    region=region,
                    placed=placed,
                    source_size=source_size,
                ),
            )
            for item in response.explanations
        ),
        predictions=tuple(
            ClassScore(class_id=item.class_id, label=item.label, logit=item.logit, probability=item.probability)
            for item in response.predictions
        ),
        source_region=region,
        source_size=source_size,
        model=response.model,
        model_version=response.model_version,
        timing=Timing(
            queue_ms=_milliseconds(response.timing.queue_duration),
            preprocess_ms=_milliseconds(response.timing.preprocess_duration),
            compute_ms=_milliseconds(response.timing.compute_duration),
            batch_size=response.timing.batch_size,
        ),
    )


def map_values(tensor: explain_pb2.Tensor) -> Float32Array:
    """Read a map: float32 (height, width), read-only; uint8 levels are divided by 255.

    Raises:
        InternalError: unknown element type, not two dimensions, or the wrong number of bytes.
    """
    element_type = _ELEMENT_TYPES.get(tensor.data_type)
    shape = tuple(tensor.shape)
    if element_type is None or len(shape) != 2 or min(shape) < 1:
        raise InternalError(
            f"the server sent a map of data type {tensor.data_type} and shape {shape}", reason="INVALID_RESPONSE"
        )
    if math.prod(shape) * element_type.itemsize != len(tensor.data):
        raise InternalError(
            f"the server sent {len(tensor.data)} bytes for a map of {element_type} and shape {shape}",
            reason="INVALID_RESPONSE",
        )
    values = np.frombuffer(tensor.data, element_type).reshape(shape).astype(np.float32, copy=False)
    if element_type.kind == "u":
        values = values / np.float32(255)
    values.flags.writeable = False
    return values


def models_of(response: model_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """Read the list of models."""
    return tuple(
        ModelInfo(
            name=model.name,
            version=model.version,
            is_default=model.name == response.default_model,
            state=_MODEL_STATES.get(model.state, ModelState.UNKNOWN),
            state_message=model.state_message,
            task=model.task,
            input_height_px=model.input_height_px,
            input_width_px=model.input_width_px,
            class_count=model.class_count,
            methods=tuple(_method_name(number) for number in model.methods),
            default_method=_method_name(model.default_method) if model.default_method else "",
            layers=tuple(model.layers),
            engine=model.engine,
            device=model.device,
            precision=model.precision,
            max_batch_size=model.max_batch_size,
            max_queue_delay_ms=_milliseconds(model.max_queue_delay),
        )
        for model in response.models
    )


def server_info_of(response: model_pb2.GetServerInfoResponse) -> ServerInfo:
    """Read a server's version and limits."""
    return ServerInfo(
        version=response.version,
        max_message_bytes=response.max_message_bytes,
        max_image_pixels=response.max_image_pixels,
        max_queue_length=response.max_queue_length,
        max_targets=response.max_targets,
        max_in_flight=response.max_in_flight,
        max_batch_size=response.max_batch_size,
        max_queue_delay_ms=_milliseconds(response.max_queue_delay),
        max_streams=response.max_streams,
    )


def health_of(response: health_pb2.HealthCheckResponse) -> Health:
    """Read a health answer."""
    if response.status == health_pb2.HealthCheckResponse.SERVING:
        return Health.SERVING
    if response.status == health_pb2.HealthCheckResponse.NOT_SERVING:
        return Health.NOT_SERVING
    return Health.UNKNOWN


def _milliseconds(duration: Duration) -> float:
    return duration.seconds * 1e3 + duration.nanos / 1e6


def _method_name(number: int) -> str:
    """Return a method's name. A newer server may have methods that this client has no name for."""
    return _METHOD_NAMES.get(number, f"method-{number}")


def fill_image(image: explain_pb2.Image, loaded: bytes | npt.NDArray[np.uint8]) -> None:
    """Write what `load_image` returned into its place in a request: a message of its own would be copied there."""
    if isinstance(loaded, bytes):
        image.encoded = loaded
    else:
        image.pixels.data_type = explain_pb2.DATA_TYPE_UINT8
        image.pixels.shape.extend(loaded.shape)
        image.pixels.data = loaded.tobytes()


def model_name(model: str | None) -> str:
    """Return a model's name as sent; None is the default model, the empty name.

    Raises:
        InvalidArgumentError: not a text.
    """
    if model is not None and not is_text(model):
        raise InvalidArgumentError.of("model", f"expected a name, got {model!r}")
    return model or ""


def _layer_names(layers: str | Sequence[str] | None) -> list[str]:
    if layers is None:
        return []
    names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Iterable) else []
    if not names or not all(is_text(name) and name for name in names):
        raise InvalidArgumentError.of("layers", f"expected a layer's name or a list of names, got {layers!r}")
    return names


def _class_ids(class_ids: int | Sequence[int]) -> list[int]:
    values: list[Any]
    if isinstance(class_ids, np.ndarray):
        values = list(np.atleast_1d(class_ids))
    elif isinstance(class_ids, Sequence) and not isinstance(class_ids, bytes | bytearray):
        values = list(class_ids)
    else:
        values = [class_ids]
    if not values:
        raise InvalidArgumentError.of("class_ids", "expected at least one class id")
    return [checked_int("class_ids", value, at_least=0) for value in values]
