import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.rpc import status_pb2 as _status_pb2
from heatlens.v1 import faithfulness_pb2 as _faithfulness_pb2
from heatlens.v1 import method_pb2 as _method_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MapSize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_SIZE_UNSPECIFIED: _ClassVar[MapSize]
    MAP_SIZE_LAYER: _ClassVar[MapSize]
    MAP_SIZE_INPUT: _ClassVar[MapSize]
    MAP_SIZE_SOURCE: _ClassVar[MapSize]

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_UINT16: _ClassVar[DataType]

class Direction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DIRECTION_UNSPECIFIED: _ClassVar[Direction]
    DIRECTION_INCREASE: _ClassVar[Direction]
    DIRECTION_DECREASE: _ClassVar[Direction]

class OverflowPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OVERFLOW_POLICY_UNSPECIFIED: _ClassVar[OverflowPolicy]
    OVERFLOW_POLICY_BLOCK: _ClassVar[OverflowPolicy]
    OVERFLOW_POLICY_DROP_OLDEST: _ClassVar[OverflowPolicy]

class ReplacementPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REPLACEMENT_POLICY_UNSPECIFIED: _ClassVar[ReplacementPolicy]
    REPLACEMENT_POLICY_FINISH: _ClassVar[ReplacementPolicy]
    REPLACEMENT_POLICY_END: _ClassVar[ReplacementPolicy]
MAP_SIZE_UNSPECIFIED: MapSize
MAP_SIZE_LAYER: MapSize
MAP_SIZE_INPUT: MapSize
MAP_SIZE_SOURCE: MapSize
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_UINT16: DataType
DIRECTION_UNSPECIFIED: Direction
DIRECTION_INCREASE: Direction
DIRECTION_DECREASE: Direction
OVERFLOW_POLICY_UNSPECIFIED: OverflowPolicy
OVERFLOW_POLICY_BLOCK: OverflowPolicy
OVERFLOW_POLICY_DROP_OLDEST: OverflowPolicy
REPLACEMENT_POLICY_UNSPECIFIED: ReplacementPolicy
REPLACEMENT_POLICY_FINISH: ReplacementPolicy
REPLACEMENT_POLICY_END: ReplacementPolicy

class ExplainRequest(_message.Message):
    __slots__ = ("model", "image", "options", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    image: Image
    options: ExplainOptions
    model_version: str
    def __init__(self, model: _Optional[str] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., options: _Optional[_Union[ExplainOptions, _Mapping]] = ..., model_version: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "pixels")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    pixels: Tensor
    def __init__(self, encoded: _Optional[bytes] = ..., pixels: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("data_type", "shape", "data")
    DATA_TYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    data_type: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, data_type: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ExplainOptions(_message.Message):
    __slots__ = ("method", "top_k", "class_ids", "layers", "map_size", "map_type", "smoothing", "top_predictions", "target_score", "aggregation", "faithfulness", "mask", "reference_embedding", "reference_image", "min_score", "return_mask", "direction")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    CLASS_IDS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    MAP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAP_TYPE_FIELD_NUMBER: _ClassVar[int]
    SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    TOP_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_SCORE_FIELD_NUMBER: _ClassVar[int]
    AGGREGATION_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    MASK_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    REFERENCE_IMAGE_FIELD_NUMBER: _ClassVar[int]
    MIN_SCORE_FIELD_NUMBER: _ClassVar[int]
    RETURN_MASK_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    method: _method_pb2.Method
    top_k: int
    class_ids: ClassIds
    layers: _containers.RepeatedScalarFieldContainer[str]
    map_size: MapSize
    map_type: DataType
    smoothing: Smoothing
    top_predictions: int
    target_score: _method_pb2.TargetScore
    aggregation: _method_pb2.Aggregation
    faithfulness: _faithfulness_pb2.FaithfulnessOptions
    mask: Tensor
    reference_embedding: Tensor
    reference_image: Image
    min_score: float
    return_mask: bool
    direction: Direction
    def __init__(self, method: _Optional[_Union[_method_pb2.Method, str]] = ..., top_k: _Optional[int] = ..., class_ids: _Optional[_Union[ClassIds, _Mapping]] = ..., layers: _Optional[_Iterable[str]] = ..., map_size: _Optional[_Union[MapSize, str]] = ..., map_type: _Optional[_Union[DataType, str]] = ..., smoothing: _Optional[_Union[Smoothing, _Mapping]] = ..., top_predictions: _Optional[int] = ..., target_score: _Optional[_Union[_method_pb2.TargetScore, str]] = ..., aggregation: _Optional[_Union[_method_pb2.Aggregation, str]] = ..., faithfulness: _Optional[_Union[_faithfulness_pb2.FaithfulnessOptions, _Mapping]] = ..., mask: _Optional[_Union[Tensor, _Mapping]] = ..., reference_embedding: _Optional[_Union[Tensor, _Mapping]] = ..., reference_image: _Optional[_Union[Image, _Mapping]] = ..., min_score: _Optional[float] = ..., return_mask: bool = ..., direction: _Optional[_Union[Direction, str]] = ...) -> None: ...

class ClassIds(_message.Message):
    __slots__ = ("values", "labels")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[int]] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class Smoothing(_message.Message):
    __slots__ = ("augmentation", "principal_component")
    AUGMENTATION_FIELD_NUMBER: _ClassVar[int]
    PRINCIPAL_COMPONENT_FIELD_NUMBER: _ClassVar[int]
    augmentation: bool
    principal_component: bool
    def __init__(self, augmentation: bool = ..., principal_component: bool = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanations", "predictions", "source_region", "model", "model_version", "timing", "source_width_px", "source_height_px", "predicted_mask", "embedding", "warnings")
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_REGION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    SOURCE_HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MASK_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[Explanation]
    predictions: _containers.RepeatedCompositeFieldContainer[ClassScore]
    source_region: PixelBox
    model: str
    model_version: str
    timing: Timing
    source_width_px: int
    source_height_px: int
    predicted_mask: Tensor
    embedding: Tensor
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, explanations: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ..., predictions: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ..., source_region: _Optional[_Union[PixelBox, _Mapping]] = ..., model: _Optional[str] = ..., model_version: _Optional[str] = ..., timing: _Optional[_Union[Timing, _Mapping]] = ..., source_width_px: _Optional[int] = ..., source_height_px: _Optional[int] = ..., predicted_mask: _Optional[_Union[Tensor, _Mapping]] = ..., embedding: _Optional[_Union[Tensor, _Mapping]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("class_id", "label", "logit", "probability", "map", "map_scale", "box", "map_offset", "area", "faithfulness", "value", "predicted_mask")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    MAP_FIELD_NUMBER: _ClassVar[int]
    MAP_SCALE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    MAP_OFFSET_FIELD_NUMBER: _ClassVar[int]
    AREA_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_MASK_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    label: str
    logit: float
    probability: float
    map: Tensor
    map_scale: float
    box: PixelBox
    map_offset: float
    area: float
    faithfulness: _faithfulness_pb2.Faithfulness
    value: float
    predicted_mask: Tensor
    def __init__(self, class_id: _Optional[int] = ..., label: _Optional[str] = ..., logit: _Optional[float] = ..., probability: _Optional[float] = ..., map: _Optional[_Union[Tensor, _Mapping]] = ..., map_scale: _Optional[float] = ..., box: _Optional[_Union[PixelBox, _Mapping]] = ..., map_offset: _Optional[float] = ..., area: _Optional[float] = ..., faithfulness: _Optional[_Union[_faithfulness_pb2.Faithfulness, _Mapping]] = ..., value: _Optional[float] = ..., predicted_mask: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...

class ClassScore(_message.Message):
    __slots__ = ("class_id", "label", "logit", "probability", "value")
    CLASS_ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    class_id: int
    label: str
    logit: float
    probability: float
    value: float
    def __init__(self, class_id: _Optional[int] = ..., label: _Optional[str] = ..., logit: _Optional[float] = ..., probability: _Optional[float] = ..., value: _Optional[float] = ...) -> None: ...

class PixelBox(_message.Message):
    __slots__ = ("left", "top", "right", "bottom")
    LEFT_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    RIGHT_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    left: float
    top: float
    right: float
    bottom: float
    def __init__(self, left: _Optional[float] = ..., top: _Optional[float] = ..., right: _Optional[float] = ..., bottom: _Optional[float] = ...) -> None: ...

class Timing(_message.Message):
    __slots__ = ("queue_duration", "preprocess_duration", "compute_duration", "batch_size")
    QUEUE_DURATION_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_DURATION_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DURATION_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    queue_duration: _duration_pb2.Duration
    preprocess_duration: _duration_pb2.Duration
    compute_duration: _duration_pb2.Duration
    batch_size: int
    def __init__(self, queue_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., preprocess_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., compute_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., batch_size: _Optional[int] = ...) -> None: ...

class StreamExplainRequest(_message.Message):
    __slots__ = ("config", "frame")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    config: StreamConfig
    frame: Frame
    def __init__(self, config: _Optional[_Union[StreamConfig, _Mapping]] = ..., frame: _Optional[_Union[Frame, _Mapping]] = ...) -> None: ...

class StreamConfig(_message.Message):
    __slots__ = ("model", "options", "overflow_policy", "max_in_flight", "frame_timeout", "explain_every", "max_frames_per_second", "temporal_smoothing", "replacement_policy", "model_version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_POLICY_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    FRAME_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_EVERY_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TEMPORAL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    REPLACEMENT_POLICY_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    options: ExplainOptions
    overflow_policy: OverflowPolicy
    max_in_flight: int
    frame_timeout: _duration_pb2.Duration
    explain_every: int
    max_frames_per_second: float
    temporal_smoothing: float
    replacement_policy: ReplacementPolicy
    model_version: str
    def __init__(self, model: _Optional[str] = ..., options: _Optional[_Union[ExplainOptions, _Mapping]] = ..., overflow_policy: _Optional[_Union[OverflowPolicy, str]] = ..., max_in_flight: _Optional[int] = ..., frame_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., explain_every: _Optional[int] = ..., max_frames_per_second: _Optional[float] = ..., temporal_smoothing: _Optional[float] = ..., replacement_policy: _Optional[_Union[ReplacementPolicy, str]] = ..., model_version: _Optional[str] = ...) -> None: ...

class Frame(_message.Message):
    __slots__ = ("frame_id", "image", "capture_time")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    CAPTURE_TIME_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    image: Image
    capture_time: _timestamp_pb2.Timestamp
    def __init__(self, frame_id: _Optional[int] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., capture_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class StreamExplainResponse(_message.Message):
    __slots__ = ("frame_id", "started", "result", "error", "skipped")
    FRAME_ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    frame_id: int
    started: StreamStarted
    result: ExplainResponse
    error: _status_pb2.Status
    skipped: FrameSkipped
    def __init__(self, frame_id: _Optional[int] = ..., started: _Optional[_Union[StreamStarted, _Mapping]] = ..., result: _Optional[_Union[ExplainResponse, _Mapping]] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., skipped: _Optional[_Union[FrameSkipped, _Mapping]] = ...) -> None: ...

class StreamStarted(_message.Message):
    __slots__ = ("model", "model_version", "max_in_flight")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    model: str
    model_version: str
    max_in_flight: int
    def __init__(self, model: _Optional[str] = ..., model_version: _Optional[str] = ..., max_in_flight: _Optional[int] = ...) -> None: ...

class FrameSkipped(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
