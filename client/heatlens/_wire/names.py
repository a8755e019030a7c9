"""Public names of the protocol's enums.

A method's name is its enum value's name without the prefix, in lower case, with hyphens; map sizes, map types, metrics
and the rest go by the same rule. This is the one place where that rule is.
"""

from collections.abc import Iterable
from typing import Literal, get_args

from heatlens.v1 import explain_pb2, faithfulness_pb2, method_pb2, model_pb2

MapSizeName = Literal["layer", "input", "source"]
MapTypeName = Literal["float32", "float16", "uint8"]
TargetScoreName = Literal["logit", "probability", "log-probability", "contrast"]
AggregationName = Literal["mean", "max", "product"]
DirectionName = Literal["increase", "decrease"]


def _names(items: Iterable[tuple[str, int]], prefix: str) -> dict[str, int]:
    """Return an enum's values by public name; the zero value has none."""
    return {name.removeprefix(prefix).lower().replace("_", "-"): number for name, number in items if number}


METHODS = _names(method_pb2.Method.items(), "METHOD_")
MAP_SIZES = _names(explain_pb2.MapSize.items(), "MAP_SIZE_")
MAP_TYPES = {name: _names(explain_pb2.DataType.items(), "DATA_TYPE_")[name] for name in get_args(MapTypeName)}
OVERFLOW_POLICIES = _names(explain_pb2.OverflowPolicy.items(), "OVERFLOW_POLICY_")
REPLACEMENT_POLICIES = _names(explain_pb2.ReplacementPolicy.items(), "REPLACEMENT_POLICY_")
TARGET_SCORES = _names(method_pb2.TargetScore.items(), "TARGET_SCORE_")
DIRECTIONS = _names(explain_pb2.Direction.items(), "DIRECTION_")
AGGREGATIONS = _names(method_pb2.Aggregation.items(), "AGGREGATION_")
METRICS = _names(faithfulness_pb2.FaithfulnessMetric.items(), "FAITHFULNESS_METRIC_")
MODEL_STATES = _names(model_pb2.Model.State.items(), "STATE_")
