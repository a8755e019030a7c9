"""The names of the wire contract in terms of the house: enums both ways, in one place."""

from typing import cast

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import method_pb2
from heatlens_server.cam.catalog import Method


def _proto_method(method: Method) -> method_pb2.Method:
    return cast("method_pb2.Method", method_pb2.Method.Value("METHOD_" + method.value.upper().replace("-", "_")))


METHOD_TO_PROTO: dict[Method, method_pb2.Method] = {method: _proto_method(method) for method in Method}
METHOD_FROM_PROTO: dict[int, Method] = {int(value): method for method, value in METHOD_TO_PROTO.items()}

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
