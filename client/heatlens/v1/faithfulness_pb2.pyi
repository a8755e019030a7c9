from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FaithfulnessMetric(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAITHFULNESS_METRIC_UNSPECIFIED: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_DELETION: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_INSERTION: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_ROAD_MORF: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_ROAD_LERF: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_ROAD_COMBINED: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_AVERAGE_DROP: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_INCREASE: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_SPARSENESS: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_MODEL_RANDOMISATION: _ClassVar[FaithfulnessMetric]
    FAITHFULNESS_METRIC_CLASS_SENSITIVITY: _ClassVar[FaithfulnessMetric]
FAITHFULNESS_METRIC_UNSPECIFIED: FaithfulnessMetric
FAITHFULNESS_METRIC_DELETION: FaithfulnessMetric
FAITHFULNESS_METRIC_INSERTION: FaithfulnessMetric
FAITHFULNESS_METRIC_ROAD_MORF: FaithfulnessMetric
FAITHFULNESS_METRIC_ROAD_LERF: FaithfulnessMetric
FAITHFULNESS_METRIC_ROAD_COMBINED: FaithfulnessMetric
FAITHFULNESS_METRIC_AVERAGE_DROP: FaithfulnessMetric
FAITHFULNESS_METRIC_INCREASE: FaithfulnessMetric
FAITHFULNESS_METRIC_SPARSENESS: FaithfulnessMetric
FAITHFULNESS_METRIC_MODEL_RANDOMISATION: FaithfulnessMetric
FAITHFULNESS_METRIC_CLASS_SENSITIVITY: FaithfulnessMetric

class FaithfulnessOptions(_message.Message):
    __slots__ = ("metrics",)
    METRICS_FIELD_NUMBER: _ClassVar[int]
    metrics: _containers.RepeatedScalarFieldContainer[FaithfulnessMetric]
    def __init__(self, metrics: _Optional[_Iterable[_Union[FaithfulnessMetric, str]]] = ...) -> None: ...

class Faithfulness(_message.Message):
    __slots__ = ("deletion", "insertion", "road_morf", "road_lerf", "road_combined", "average_drop", "increase", "sparseness", "model_randomisation", "class_sensitivity")
    DELETION_FIELD_NUMBER: _ClassVar[int]
    INSERTION_FIELD_NUMBER: _ClassVar[int]
    ROAD_MORF_FIELD_NUMBER: _ClassVar[int]
    ROAD_LERF_FIELD_NUMBER: _ClassVar[int]
    ROAD_COMBINED_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_DROP_FIELD_NUMBER: _ClassVar[int]
    INCREASE_FIELD_NUMBER: _ClassVar[int]
    SPARSENESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_RANDOMISATION_FIELD_NUMBER: _ClassVar[int]
    CLASS_SENSITIVITY_FIELD_NUMBER: _ClassVar[int]
    deletion: float
    insertion: float
    road_morf: float
    road_lerf: float
    road_combined: float
    average_drop: float
    increase: float
    sparseness: float
    model_randomisation: float
    class_sensitivity: float
    def __init__(self, deletion: _Optional[float] = ..., insertion: _Optional[float] = ..., road_morf: _Optional[float] = ..., road_lerf: _Optional[float] = ..., road_combined: _Optional[float] = ..., average_drop: _Optional[float] = ..., increase: _Optional[float] = ..., sparseness: _Optional[float] = ..., model_randomisation: _Optional[float] = ..., class_sensitivity: _Optional[float] = ...) -> None: ...
