"""From requests to queries, and from a query's fields to their paths in requests. Nothing is checked here."""

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from typing import TypeVar, cast

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.api.query import (
    EmptyMessage,
    Frame,
    Image,
    MapSize,
    MapType,
    Options,
    OverflowPolicy,
    Query,
    ReplacementPolicy,
    StreamConfig,
    StreamMessage,
    Tensor,
)
from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.targets import ClassIds, Direction

_E = TypeVar("_E", bound=StrEnum)


def _by_number(wire: EnumTypeWrapper, prefix: str, ours: type[_E]) -> dict[int, _E]:
    """Our members by the numbers of the proto's values, whose names are ours with a prefix."""
    return {wire.Value(f"{prefix}_{member.upper().replace('-', '_')}"): member for member in ours}


METHOD_FROM_PROTO = _by_number(method_pb2.Method, "METHOD", Method)
METHOD_TO_PROTO = {method: cast("method_pb2.Method", number) for number, method in METHOD_FROM_PROTO.items()}
SCORE_FROM_PROTO = _by_number(method_pb2.TargetScore, "TARGET_SCORE", Score)
AGGREGATION_FROM_PROTO = _by_number(method_pb2.Aggregation, "AGGREGATION", Aggregation)
METRIC_FROM_PROTO = _by_number(faithfulness_pb2.FaithfulnessMetric, "FAITHFULNESS_METRIC", Metric)
MAP_SIZES = {pb.MAP_SIZE_UNSPECIFIED: MapSize.LAYER} | _by_number(pb.MapSize, "MAP_SIZE", MapSize)
OVERFLOW_POLICIES = {pb.OVERFLOW_POLICY_UNSPECIFIED: OverflowPolicy.BLOCK} | _by_number(
    pb.OverflowPolicy, "OVERFLOW_POLICY", OverflowPolicy
)
REPLACEMENT_POLICIES = {pb.REPLACEMENT_POLICY_UNSPECIFIED: ReplacementPolicy.FINISH} | _by_number(
    pb.ReplacementPolicy, "REPLACEMENT_POLICY", ReplacementPolicy
)
DIRECTIONS = _by_number(pb.Direction, "DIRECTION", Direction)
MAP_TYPES: dict[int, MapType] = {
    pb.DATA_TYPE_UNSPECIFIED: MapType.FLOAT32,
    pb.DATA_TYPE_FLOAT32: MapType.FLOAT32,
    pb.DATA_TYPE_FLOAT16: MapType.FLOAT16,
    pb.DATA_TYPE_UINT8: MapType.UINT8,
}


def query_of(request: pb.ExplainRequest) -> Query:
    """The query that a request makes."""
    return Query(request.model, _image(request.image), _options(request.options), request.model_version)


def stream_message_of(request: pb.StreamExplainRequest) -> StreamMessage:
    """What a message of a stream holds."""
    payload = request.WhichOneof("payload")
    if payload == "frame":
        frame = request.frame
        at = frame.capture_time if frame.HasField("capture_time") else None
        return Frame(frame.frame_id, _image(frame.image), None if at is None else at.seconds + at.nanos / 1e9)
    if payload == "config":
        return _config(request.config)
    return EmptyMessage()


def _config(config: pb.StreamConfig) -> StreamConfig:
    # protobuf's own conversion of a duration refuses what lies outside of its range.
    timeout = config.frame_timeout if config.HasField("frame_timeout") else None
    return StreamConfig(
        model=config.model,
        model_version=config.model_version,
        options=_options(config.options),
        overflow_policy=OVERFLOW_POLICIES.get(config.overflow_policy, int(config.overflow_policy)),
        max_in_flight=config.max_in_flight,
        frame_timeout_s=None if timeout is None else timeout.seconds + timeout.nanos / 1e9,
        explain_every=config.explain_every,
        max_frames_per_second=config.max_frames_per_second,
        temporal_smoothing=config.temporal_smoothing,
        replacement_policy=REPLACEMENT_POLICIES.get(config.replacement_policy, int(config.replacement_policy)),
    )


def _options(options: pb.ExplainOptions) -> Options:
    target, reference = options.WhichOneof("target"), options.WhichOneof("reference")
    return Options(
        method=_named(options.method, METHOD_FROM_PROTO),
        top_k=options.top_k if target == "top_k" else None,
        class_ids=ClassIds(tuple(options.class_ids.values)) if target == "class_ids" else None,
        class_labels=tuple(options.class_ids.labels),
        layers=tuple(options.layers),
        map_size=MAP_SIZES.get(options.map_size, int(options.map_size)),
        map_type=MAP_TYPES.get(options.map_type, int(options.map_type)),
        augmentation=options.smoothing.augmentation,
        principal_component=options.smoothing.principal_component,
        top_predictions=options.top_predictions,
        target_score=_named(options.target_score, SCORE_FROM_PROTO),
        aggregation=_named(options.aggregation, AGGREGATION_FROM_PROTO),
        faithfulness=options.HasField("faithfulness"),
        metrics=tuple(METRIC_FROM_PROTO.get(number, int(number)) for number in options.faithfulness.metrics),
        mask=_tensor(options.mask) if options.HasField("mask") else None,
        reference_embedding=_tensor(options.reference_embedding) if reference == "reference_embedding" else None,
        reference_image=_image(options.reference_image) if reference == "reference_image" else None,
        min_score=options.min_score if options.HasField("min_score") else None,
        return_mask=options.return_mask,
        direction=_named(options.direction, DIRECTIONS),
    )


def _named(number: int, names: Mapping[int, _E]) -> _E | int | None:
    """The member of an enum; None for UNSPECIFIED, and the number if it stands for nothing."""
    return names.get(number, int(number)) if number else None


def _image(image: pb.Image) -> Image:
    source = image.WhichOneof("source")
    if source == "encoded":
        return Image(encoded=image.encoded)
    return Image(pixels=_tensor(image.pixels)) if source == "pixels" else Image()


def _tensor(tensor: pb.Tensor) -> Tensor:
    return Tensor(data_type_name(tensor.data_type), tuple(tensor.shape), tensor.data)


def data_type_name(value: int) -> str:
    """A DataType's name without its prefix ("UINT8"); the number itself if it is unknown."""
    known = pb.DataType.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("DATA_TYPE_") if known else str(value)


_OPTIONS = frozenset(field.name for field in dataclasses.fields(Options))

_PATHS = {
    "class_ids.ids": "class_ids.values",
    "class_labels": "class_ids.labels",
    "augmentation": "smoothing.augmentation",
    "principal_component": "smoothing.principal_component",
    "metrics": "faithfulness.metrics",
    "frame_timeout_s": "frame_timeout",
}
"""Fields of queries that have another name on the wire."""


def explain_path(field: str) -> str:
    """Where a field of a query lies in an ExplainRequest: "layers[1]" is "options.layers[1]"."""
    name, bracket, index = field.partition("[")
    path = _PATHS.get(name, name) + bracket + index
    return f"options.{path}" if name.partition(".")[0] in _OPTIONS else path


def stream_path(field: str) -> str:
    """Where a field of a query, a configuration or a frame lies in a StreamExplainRequest."""
    path = explain_path(field)
    root = path.partition(".")[0]
    if root in {"image", "frame_id"}:
        return f"frame.{path}"
    return path if root in {"", "config", "frame"} else f"config.{path}"
