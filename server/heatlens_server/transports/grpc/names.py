"""The names of the wire contract in terms of the house: enums both ways, in one place."""

from typing import cast

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.core.methods import Aggregation, Method, Metric, Score


def _proto_method(method: Method) -> method_pb2.Method:
    return cast("method_pb2.Method", method_pb2.Method.Value("METHOD_" + _upper(method)))


def _upper(name: str) -> str:
    return name.upper().replace("-", "_")


METHOD_TO_PROTO: dict[Method, method_pb2.Method] = {method: _proto_method(method) for method in Method}
METHOD_FROM_PROTO: dict[int, Method] = {int(value): method for method, value in METHOD_TO_PROTO.items()}

SCORE_FROM_PROTO: dict[int, Score] = {
    int(method_pb2.TargetScore.Value("TARGET_SCORE_" + _upper(score))): score for score in Score
}
AGGREGATION_FROM_PROTO: dict[int, Aggregation] = {
    int(method_pb2.Aggregation.Value("AGGREGATION_" + _upper(aggregation))): aggregation for aggregation in Aggregation
}
METRIC_FROM_PROTO: dict[int, Metric] = {
    int(faithfulness_pb2.FaithfulnessMetric.Value("FAITHFULNESS_METRIC_" + _upper(metric))): metric for metric in Metric
}

MAP_DTYPES: dict[int, str] = {
    pb.DATA_TYPE_UNSPECIFIED: "<f4",
    pb.DATA_TYPE_FLOAT32: "<f4",
    pb.DATA_TYPE_FLOAT16: "<f2",
    pb.DATA_TYPE_UINT8: "u1",
}
"""Element type of a map on the wire, as a numpy dtype, by DataType."""

EXPLAIN_SERVICE = pb.DESCRIPTOR.services_by_name["ExplainService"].full_name


def data_type_name(value: int) -> str:
    """A DataType's name without its prefix ("UINT8"); the number itself if it is unknown."""
    known = pb.DataType.DESCRIPTOR.values_by_number.get(value)
    return known.name.removeprefix("DATA_TYPE_") if known else str(value)
