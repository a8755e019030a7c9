from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

class Method(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    METHOD_UNSPECIFIED: _ClassVar[Method]
    METHOD_CAM: _ClassVar[Method]
    METHOD_GRAD_CAM: _ClassVar[Method]
    METHOD_GRAD_CAM_PLUS_PLUS: _ClassVar[Method]
    METHOD_HI_RES_CAM: _ClassVar[Method]
    METHOD_X_GRAD_CAM: _ClassVar[Method]
    METHOD_LAYER_CAM: _ClassVar[Method]
    METHOD_ELEMENT_WISE_GRAD_CAM: _ClassVar[Method]
    METHOD_EIGEN_CAM: _ClassVar[Method]
    METHOD_EIGEN_GRAD_CAM: _ClassVar[Method]
    METHOD_KPCA_CAM: _ClassVar[Method]
    METHOD_FEM: _ClassVar[Method]
    METHOD_RANDOM_CAM: _ClassVar[Method]
    METHOD_FINER_CAM: _ClassVar[Method]
    METHOD_REFINE_CAM: _ClassVar[Method]
    METHOD_SHAPLEY_CAM: _ClassVar[Method]
    METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS: _ClassVar[Method]
    METHOD_SCORE_CAM: _ClassVar[Method]
    METHOD_SS_CAM: _ClassVar[Method]
    METHOD_IS_CAM: _ClassVar[Method]
    METHOD_ABLATION_CAM: _ClassVar[Method]
    METHOD_RECIPRO_CAM: _ClassVar[Method]
    METHOD_FULL_GRAD: _ClassVar[Method]
    METHOD_LE_GRAD: _ClassVar[Method]
    METHOD_GUIDED_GRAD_CAM: _ClassVar[Method]
    METHOD_RISE: _ClassVar[Method]

class TargetScore(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TARGET_SCORE_UNSPECIFIED: _ClassVar[TargetScore]
    TARGET_SCORE_LOGIT: _ClassVar[TargetScore]
    TARGET_SCORE_PROBABILITY: _ClassVar[TargetScore]
    TARGET_SCORE_LOG_PROBABILITY: _ClassVar[TargetScore]
    TARGET_SCORE_CONTRAST: _ClassVar[TargetScore]

class Aggregation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGGREGATION_UNSPECIFIED: _ClassVar[Aggregation]
    AGGREGATION_MEAN: _ClassVar[Aggregation]
    AGGREGATION_MAX: _ClassVar[Aggregation]
    AGGREGATION_PRODUCT: _ClassVar[Aggregation]
METHOD_UNSPECIFIED: Method
METHOD_CAM: Method
METHOD_GRAD_CAM: Method
METHOD_GRAD_CAM_PLUS_PLUS: Method
METHOD_HI_RES_CAM: Method
METHOD_X_GRAD_CAM: Method
METHOD_LAYER_CAM: Method
METHOD_ELEMENT_WISE_GRAD_CAM: Method
METHOD_EIGEN_CAM: Method
METHOD_EIGEN_GRAD_CAM: Method
METHOD_KPCA_CAM: Method
METHOD_FEM: Method
METHOD_RANDOM_CAM: Method
METHOD_FINER_CAM: Method
METHOD_REFINE_CAM: Method
METHOD_SHAPLEY_CAM: Method
METHOD_SMOOTH_GRAD_CAM_PLUS_PLUS: Method
METHOD_SCORE_CAM: Method
METHOD_SS_CAM: Method
METHOD_IS_CAM: Method
METHOD_ABLATION_CAM: Method
METHOD_RECIPRO_CAM: Method
METHOD_FULL_GRAD: Method
METHOD_LE_GRAD: Method
METHOD_GUIDED_GRAD_CAM: Method
METHOD_RISE: Method
TARGET_SCORE_UNSPECIFIED: TargetScore
TARGET_SCORE_LOGIT: TargetScore
TARGET_SCORE_PROBABILITY: TargetScore
TARGET_SCORE_LOG_PROBABILITY: TargetScore
TARGET_SCORE_CONTRAST: TargetScore
AGGREGATION_UNSPECIFIED: Aggregation
AGGREGATION_MEAN: Aggregation
AGGREGATION_MAX: Aggregation
AGGREGATION_PRODUCT: Aggregation
