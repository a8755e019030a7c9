import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from heatlens.v1 import method_pb2 as _method_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LoadModelRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class LoadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class UnloadModelRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class UnloadModelResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReloadModelRequest(_message.Message):
    __slots__ = ("name", "version")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ReloadModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "default_model")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    default_model: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., default_model: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "state", "task", "input_height_px", "input_width_px", "class_count", "methods", "layers", "engine", "device", "precision", "state_message", "default_method", "max_batch_size", "max_queue_delay", "method_support", "activation", "input_channels", "preprocess", "assumptions", "runs_one_by_one", "next_engine", "is_default_version", "weight", "devices", "weights_bytes")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[Model.State]
        STATE_LOADING: _ClassVar[Model.State]
        STATE_READY: _ClassVar[Model.State]
        STATE_FAILED: _ClassVar[Model.State]
        STATE_UNAVAILABLE: _ClassVar[Model.State]
        STATE_IDLE: _ClassVar[Model.State]
    STATE_UNSPECIFIED: Model.State
    STATE_LOADING: Model.State
    STATE_READY: Model.State
    STATE_FAILED: Model.State
    STATE_UNAVAILABLE: Model.State
    STATE_IDLE: Model.State
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    INPUT_HEIGHT_PX_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIDTH_PX_FIELD_NUMBER: _ClassVar[int]
    CLASS_COUNT_FIELD_NUMBER: _ClassVar[int]
    METHODS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    STATE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_METHOD_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_DELAY_FIELD_NUMBER: _ClassVar[int]
    METHOD_SUPPORT_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    INPUT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESS_FIELD_NUMBER: _ClassVar[int]
    ASSUMPTIONS_FIELD_NUMBER: _ClassVar[int]
    RUNS_ONE_BY_ONE_FIELD_NUMBER: _ClassVar[int]
    NEXT_ENGINE_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_VERSION_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    state: Model.State
    task: str
    input_height_px: int
    input_width_px: int
    class_count: int
    methods: _containers.RepeatedScalarFieldContainer[_method_pb2.Method]
    layers: _containers.RepeatedScalarFieldContainer[str]
    engine: str
    device: str
    precision: str
    state_message: str
    default_method: _method_pb2.Method
    max_batch_size: int
    max_queue_delay: _duration_pb2.Duration
    method_support: _containers.RepeatedCompositeFieldContainer[MethodSupport]
    activation: str
    input_channels: int
    preprocess: Preprocess
    assumptions: _containers.RepeatedScalarFieldContainer[str]
    runs_one_by_one: bool
    next_engine: str
    is_default_version: bool
    weight: float
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    weights_bytes: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[_Union[Model.State, str]] = ..., task: _Optional[str] = ..., input_height_px: _Optional[int] = ..., input_width_px: _Optional[int] = ..., class_count: _Optional[int] = ..., methods: _Optional[_Iterable[_Union[_method_pb2.Method, str]]] = ..., layers: _Optional[_Iterable[str]] = ..., engine: _Optional[str] = ..., device: _Optional[str] = ..., precision: _Optional[str] = ..., state_message: _Optional[str] = ..., default_method: _Optional[_Union[_method_pb2.Method, str]] = ..., max_batch_size: _Optional[int] = ..., max_queue_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., method_support: _Optional[_Iterable[_Union[MethodSupport, _Mapping]]] = ..., activation: _Optional[str] = ..., input_channels: _Optional[int] = ..., preprocess: _Optional[_Union[Preprocess, _Mapping]] = ..., assumptions: _Optional[_Iterable[str]] = ..., runs_one_by_one: bool = ..., next_engine: _Optional[str] = ..., is_default_version: bool = ..., weight: _Optional[float] = ..., devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ..., weights_bytes: _Optional[int] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "in_service", "message")
    NAME_FIELD_NUMBER: _ClassVar[int]
    IN_SERVICE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    name: str
    in_service: bool
    message: str
    def __init__(self, name: _Optional[str] = ..., in_service: bool = ..., message: _Optional[str] = ...) -> None: ...

class Preprocess(_message.Message):
    __slots__ = ("window", "window_auto", "resize_px", "crop_px", "max_side_px", "interpolation", "letterbox", "pad_to_multiple", "channel_order", "scale", "mean", "std")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOW_AUTO_FIELD_NUMBER: _ClassVar[int]
    RESIZE_PX_FIELD_NUMBER: _ClassVar[int]
    CROP_PX_FIELD_NUMBER: _ClassVar[int]
    MAX_SIDE_PX_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    LETTERBOX_FIELD_NUMBER: _ClassVar[int]
    PAD_TO_MULTIPLE_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_ORDER_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    window: _containers.RepeatedScalarFieldContainer[float]
    window_auto: bool
    resize_px: _containers.RepeatedScalarFieldContainer[int]
    crop_px: _containers.RepeatedScalarFieldContainer[int]
    max_side_px: int
    interpolation: str
    letterbox: bool
    pad_to_multiple: int
    channel_order: str
    scale: float
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, window: _Optional[_Iterable[float]] = ..., window_auto: bool = ..., resize_px: _Optional[_Iterable[int]] = ..., crop_px: _Optional[_Iterable[int]] = ..., max_side_px: _Optional[int] = ..., interpolation: _Optional[str] = ..., letterbox: bool = ..., pad_to_multiple: _Optional[int] = ..., channel_order: _Optional[str] = ..., scale: _Optional[float] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ...) -> None: ...

class MethodSupport(_message.Message):
    __slots__ = ("method", "engine", "in_steps")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    IN_STEPS_FIELD_NUMBER: _ClassVar[int]
    method: _method_pb2.Method
    engine: str
    in_steps: bool
    def __init__(self, method: _Optional[_Union[_method_pb2.Method, str]] = ..., engine: _Optional[str] = ..., in_steps: bool = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "max_message_bytes", "max_image_pixels", "max_queue_length", "max_targets", "max_in_flight", "max_batch_size", "max_queue_delay", "max_streams", "max_image_parts", "max_image_samples", "max_decoding_bytes", "max_bytes_in_flight", "max_connection_bytes_in_flight", "max_model_runs")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_TARGETS_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_DELAY_FIELD_NUMBER: _ClassVar[int]
    MAX_STREAMS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PARTS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_DECODING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_CONNECTION_BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_RUNS_FIELD_NUMBER: _ClassVar[int]
    version: str
    max_message_bytes: int
    max_image_pixels: int
    max_queue_length: int
    max_targets: int
    max_in_flight: int
    max_batch_size: int
    max_queue_delay: _duration_pb2.Duration
    max_streams: int
    max_image_parts: int
    max_image_samples: int
    max_decoding_bytes: int
    max_bytes_in_flight: int
    max_connection_bytes_in_flight: int
    max_model_runs: int
    def __init__(self, version: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_queue_length: _Optional[int] = ..., max_targets: _Optional[int] = ..., max_in_flight: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., max_queue_delay: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_streams: _Optional[int] = ..., max_image_parts: _Optional[int] = ..., max_image_samples: _Optional[int] = ..., max_decoding_bytes: _Optional[int] = ..., max_bytes_in_flight: _Optional[int] = ..., max_connection_bytes_in_flight: _Optional[int] = ..., max_model_runs: _Optional[int] = ...) -> None: ...
