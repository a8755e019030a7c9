"""From protobuf to values: pure functions that read answers. `status` reads errors; `requests` writes."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from heatlens._exceptions import InternalError
from heatlens._results.geometry import Float32Array, PixelBox
from heatlens._results.heatmap import Heatmap
from heatlens._results.images import UInt8Array
from heatlens._results.results import (
    ClassScore,
    DeviceInfo,
    Explanation,
    Faithfulness,
    Health,
    ModelInfo,
    ModelState,
    Preprocess,
    Result,
    ServerInfo,
    Timing,
)
from heatlens._wire.names import METHODS, METRICS, MODEL_STATES
from heatlens.v1 import explain_pb2, faithfulness_pb2, model_pb2

_METHOD_NAMES = {number: name for name, number in METHODS.items()}
_MODEL_STATES = {number: ModelState(name) for name, number in MODEL_STATES.items()}
_ELEMENT_TYPES: dict[int, np.dtype[Any]] = {
    explain_pb2.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    explain_pb2.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    explain_pb2.DATA_TYPE_UINT8: np.dtype("u1"),
}

_MAX_SIDE_PX = 1_048_576
_MAX_PIXELS = 89_478_485
"""Servers accept no larger images, whatever they are told to."""

_ROUNDING = 1e-3
"""How far a map may be above 1: half precision rounds so."""


def result_of(response: explain_pb2.ExplainResponse, *, placed: bool) -> Result:
    """Read an answer. `placed`: whether maps of the source image's size were asked for.

    Raises:
        InternalError: the answer breaks the contract (reason INVALID_RESPONSE).
    """
    region = _box_of(response.source_region)
    size = (response.source_width_px, response.source_height_px)
    source_size = size if min(size) > 0 else None
    _check_places(response, placed=placed)
    return Result(
        explanations=tuple(
            Explanation(
                class_id=item.class_id,
                label=item.label,
                **_scores_of(item),
                heatmap=Heatmap(
                    values=map_values(item.map),
                    scale=item.map_scale,
                    offset=item.map_offset,
                    region=region,
                    placed=placed,
                    source_size=source_size,
                ),
                area=item.area,
                box=_box_of(item.box) if item.HasField("box") else None,
                faithfulness=_faithfulness_of(item.faithfulness) if item.HasField("faithfulness") else None,
                predicted_mask=_mask_of(item.predicted_mask) if item.HasField("predicted_mask") else None,
            )
            for item in response.explanations
        ),
        predictions=tuple(
            ClassScore(class_id=item.class_id, label=item.label, **_scores_of(item)) for item in response.predictions
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
        predicted_mask=_mask_of(response.predicted_mask) if response.HasField("predicted_mask") else None,
        embedding=_embedding_of(response.embedding) if response.HasField("embedding") else None,
        warnings=tuple(response.warnings),
    )


def _check_places(response: explain_pb2.ExplainResponse, *, placed: bool) -> None:
    """Check what maps are laid over: later it would be an error of arithmetic or of memory, far from its cause.

    Raises:
        InternalError: no size or region that an image can have, or maps of another size than the image's where that was
            asked for.
    """
    width_px, height_px = response.source_width_px, response.source_height_px
    if not (0 <= width_px <= _MAX_SIDE_PX and 0 <= height_px <= _MAX_SIDE_PX and width_px * height_px <= _MAX_PIXELS):
        raise _broken(f"an image of {width_px}x{height_px} pixels")
    if response.HasField("source_region"):
        region = response.source_region
        edges = (region.left, region.top, region.right, region.bottom)
        # Of a letterboxed image it reaches beyond the image, by less than the other side.
        if not (max(map(abs, edges)) <= 2 * _MAX_SIDE_PX and edges[0] < edges[2] and edges[1] < edges[3]):
            raise _broken(f"the region {edges}")
    for item in response.explanations:
        if not (math.isfinite(item.map_scale) and math.isfinite(item.map_offset)):
            raise _broken(f"a map of scale {item.map_scale} and offset {item.map_offset}")
        if placed and min(width_px, height_px) > 0 and tuple(item.map.shape) != (height_px, width_px):
            raise _broken(f"a map of shape {tuple(item.map.shape)} for an image of {width_px}x{height_px} pixels")


def _broken(what: str) -> InternalError:
    return InternalError(f"the server sent {what}", reason="INVALID_RESPONSE")


def _scores_of(item: explain_pb2.Explanation | explain_pb2.ClassScore) -> dict[str, float]:
    """The scores of a class; of a value, the value alone."""
    if not all(map(math.isfinite, (item.logit, item.probability, item.value))):
        raise _broken(f"scores that are not finite, of class {item.class_id}")
    if item.HasField("value"):
        return {"logit": math.nan, "probability": math.nan, "value": item.value}
    return {"logit": item.logit, "probability": item.probability}


def map_values(tensor: explain_pb2.Tensor) -> Float32Array:
    """Read a map: float32 (height, width), read-only; uint8 levels are divided by 255.

    Raises:
        InternalError: unknown element type, not two dimensions, the wrong number of bytes, or values beyond [0, 1].
    """
    stored = _elements(tensor, "map", dimensions=2)
    # Of NaN both are false.
    if stored.dtype.kind == "f" and not (stored.min() >= 0 and stored.max() <= 1 + _ROUNDING):
        raise _broken("a map of values that are not in [0, 1]")
    values = stored.astype(np.float32, copy=False)
    if stored.dtype.kind == "u":
        values = values / np.float32(255)
    values.flags.writeable = False
    return values


def _mask_of(tensor: explain_pb2.Tensor) -> UInt8Array:
    """Read a predicted mask: uint8 (height, width), read-only."""
    if tensor.data_type != explain_pb2.DATA_TYPE_UINT8:
        raise InternalError(f"the server sent a mask of data type {tensor.data_type}", reason="INVALID_RESPONSE")
    return _elements(tensor, "mask", dimensions=2)


def _embedding_of(tensor: explain_pb2.Tensor) -> Float32Array:
    """Read an embedding: float32 (length,), read-only."""
    embedding = _elements(tensor, "embedding", dimensions=1).astype(np.float32, copy=False)
    if not np.isfinite(embedding).all():
        raise _broken("an embedding that is not finite")
    embedding.flags.writeable = False
    return embedding


def _elements(tensor: explain_pb2.Tensor, name: str, *, dimensions: int) -> npt.NDArray[Any]:
    """Read a tensor of the type that it has; read-only.

    Raises:
        InternalError: unknown element type, other dimensions, or the wrong number of bytes.
    """
    element_type = _ELEMENT_TYPES.get(tensor.data_type)
    shape = tuple(tensor.shape)
    if element_type is None or len(shape) != dimensions or min(shape) < 1:
        raise InternalError(
            f"the server sent a {name} of data type {tensor.data_type} and shape {shape}", reason="INVALID_RESPONSE"
        )
    if math.prod(shape) * element_type.itemsize != len(tensor.data):
        raise InternalError(
            f"the server sent {len(tensor.data)} bytes for a {name} of {element_type} and shape {shape}",
            reason="INVALID_RESPONSE",
        )
    return np.frombuffer(tensor.data, element_type).reshape(shape)


def _box_of(box: explain_pb2.PixelBox) -> PixelBox:
    edges = (box.left, box.top, box.right, box.bottom)
    if not all(map(math.isfinite, edges)):
        raise _broken(f"a box {edges}")
    return PixelBox(*edges)


def _faithfulness_of(measured: faithfulness_pb2.Faithfulness) -> Faithfulness:
    """Read the measures that were made; the fields are named as the metrics are."""
    fields = (metric.replace("-", "_") for metric in METRICS)
    return Faithfulness(**{field: getattr(measured, field) for field in fields if measured.HasField(field)})


def models_of(response: model_pb2.ListModelsResponse) -> tuple[ModelInfo, ...]:
    """Read the list of models."""
    names = [model.name for model in response.models]
    # Servers that know no versions do not say which is the default.
    defaults = [model.is_default_version or names.count(model.name) == 1 for model in response.models]
    return tuple(
        ModelInfo(
            name=model.name,
            version=model.version,
            is_default=is_default_version and model.name == response.default_model,
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
            method_engines={_method_name(item.method): item.engine for item in model.method_support},
            methods_in_steps=tuple(_method_name(item.method) for item in model.method_support if item.in_steps),
            activation=model.activation,
            assumptions=tuple(model.assumptions),
            next_engine=model.next_engine,
            is_default_version=is_default_version,
            weight=model.weight,
            devices=tuple(
                DeviceInfo(name=device.name, in_service=device.in_service, message=device.message)
                for device in model.devices
            ),
            weights_bytes=model.weights_bytes,
            input_channels=model.input_channels,
            preprocess=_preprocess_of(model.preprocess) if model.HasField("preprocess") else None,
        )
        for model, is_default_version in zip(response.models, defaults, strict=True)
    )


def _preprocess_of(preprocess: model_pb2.Preprocess) -> Preprocess:
    window: tuple[float, float] | Literal["auto"] | None = None
    if preprocess.window_auto:
        window = "auto"
    elif len(preprocess.window) == 2:
        window = (preprocess.window[0], preprocess.window[1])
    return Preprocess(
        window=window,
        resize_px=tuple(preprocess.resize_px),
        crop_px=tuple(preprocess.crop_px),
        max_side_px=preprocess.max_side_px,
        interpolation=preprocess.interpolation,
        letterbox=preprocess.letterbox,
        pad_to_multiple=preprocess.pad_to_multiple,
        channel_order=preprocess.channel_order,
        scale=preprocess.scale,
        mean=_decimals(preprocess.mean),
        std=_decimals(preprocess.std),
    )


def _decimals(values: Iterable[float]) -> tuple[float, ...]:
    """Values that travelled as float32, as they were written: 0.485, not 0.48500001430511475."""
    return tuple(float(str(np.float32(value))) for value in values)


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
        max_image_parts=response.max_image_parts,
        max_image_samples=response.max_image_samples,
        max_decoding_bytes=response.max_decoding_bytes,
        max_bytes_in_flight=response.max_bytes_in_flight,
        max_connection_bytes_in_flight=response.max_connection_bytes_in_flight,
        max_model_runs=response.max_model_runs,
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
