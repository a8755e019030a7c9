"""Names of the contract and names of the house: each has exactly one counterpart."""

import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import method_pb2
from heatlens_server.core.methods import Method
from heatlens_server.transports.grpc.names import (
    EXPLAIN_SERVICE,
    MAP_DTYPES,
    METHOD_FROM_PROTO,
    METHOD_TO_PROTO,
    data_type_name,
)


@pytest.mark.parametrize("method", Method)
def test_every_method_goes_there_and_back(method):
    value = METHOD_TO_PROTO[method]
    assert METHOD_FROM_PROTO[value] is method
    # The rule that the proto states for names in configuration files.
    assert method_pb2.Method.Name(value).removeprefix("METHOD_").lower().replace("_", "-") == method.value


def test_every_value_of_the_enum_is_a_method():
    assert set(METHOD_FROM_PROTO) == set(method_pb2.Method.values()) - {method_pb2.METHOD_UNSPECIFIED}


def test_every_data_type_has_its_dtype():
    assert set(MAP_DTYPES) == set(pb.DataType.values())
    sizes = {pb.DATA_TYPE_UNSPECIFIED: 4, pb.DATA_TYPE_FLOAT32: 4, pb.DATA_TYPE_FLOAT16: 2, pb.DATA_TYPE_UINT8: 1}
    assert {value: np.dtype(dtype).itemsize for value, dtype in MAP_DTYPES.items()} == sizes
    assert all(np.dtype(dtype) == np.dtype(dtype).newbyteorder("<") for dtype in MAP_DTYPES.values())


@pytest.mark.parametrize(
    ("value", "name"), [(0, "UNSPECIFIED"), (1, "FLOAT32"), (2, "FLOAT16"), (3, "UINT8"), (99, "99"), (-1, "-1")]
)
def test_data_types_are_named_known_or_not(value, name):
    assert data_type_name(value) == name


def test_service_name():
    assert EXPLAIN_SERVICE == "heatlens.v1.ExplainService"
