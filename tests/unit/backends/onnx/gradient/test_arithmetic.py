"""Operators by numpy, against onnx's reference implementation: elements and their types."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import AddDefaultAttributesPass

from heatlens_server.backends.onnx.gradient.arithmetic import _FUNCTIONS, can_compute, compute

OPSET = 22
X = np.array([[7, -3, 0, 5], [2, 8, -9, 1], [4, 4, 6, -2]])
ROW, SMALL = np.array([2, -3, 1, 4]), np.array([3, 1], np.int32)
FLOATS = np.array([[0.5, -1.5, 2.5], [3.0, 0.0, -2.0]], np.float32)
WHOLE = np.array([[True, False, True, False]])


def ints(*values):
    return np.array(values, np.int64)


CASES = [
    *((op, [X], {}) for op in ("Abs", "Identity", "Neg")),
    *((op, [FLOATS], {}) for op in ("Abs", "Ceil", "Floor", "Neg", "Round")),
    *((op, [X, ROW], {}) for op in ("Add", "Sub", "Mul", "Div", "Mod", "Equal", "Greater", "GreaterOrEqual", "Less",
                                    "LessOrEqual")),
    *((op, [FLOATS, FLOATS[:1]], {}) for op in ("Add", "Sub", "Mul", "Less")),
    *((op, [WHOLE, X > 0], {}) for op in ("And", "Or", "Xor")),
    ("Not", [WHOLE], {}),
    ("Sqrt", [np.abs(FLOATS)], {}),
    ("Div", [FLOATS, np.float32(3.0)], {}),
    ("Mod", [FLOATS, np.float32(2.0)], {"fmod": 1}),
    ("Pow", [FLOATS, ints(2)], {}),
    ("Pow", [np.abs(ROW), np.float32(2.0)], {}),
    ("Cast", [FLOATS], {"to": TensorProto.INT64}),
    ("Cast", [X], {"to": TensorProto.FLOAT}),
    ("Cast", [X], {"to": TensorProto.BOOL}),
    ("Clip", [X, np.array(-2), np.array(4)], {}),
    ("Clip", [X, None, np.array(4)], {}),
    ("Concat", [X, X[:, :1]], {"axis": -1}),
    ("Concat", [ROW, ints(5)], {"axis": 0}),
    ("ConstantOfShape", [ints(2, 3)], {}),
    ("ConstantOfShape", [ints(3)], {"value": helper.make_tensor("v", TensorProto.INT64, [1], [7])}),
    ("Expand", [X[:, :1], ints(2, 1, 4)], {}),
    ("Flatten", [X[None]], {"axis": 2}),
    ("Flatten", [X[None]], {"axis": 0}),
    ("Gather", [X, ints(2, -1)], {"axis": 0}),
    ("Gather", [X, np.array(1)], {"axis": 1}),
    ("GatherND", [X, np.array([[0, 1], [2, 3]])], {}),
    ("GatherND", [X, np.array([[2]])], {}),
    ("NonZero", [X], {}),
    ("Range", [np.array(3), np.array(10), np.array(2)], {}),
    ("Range", [np.float32(1.0), np.float32(-0.5), np.float32(-0.25)], {}),
    *((op, [X, ints(-1)], {"keepdims": keep}) for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")
      for keep in (0, 1)),
    *((op, [SMALL], {"keepdims": 0}) for op in ("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum")),
    ("ReduceSum", [X], {"noop_with_empty_axes": 1}),
    ("Reshape", [X, ints(0, 2, -1)], {}),
    ("Reshape", [X[:0], ints(0, 4)], {"allowzero": 1}),
    ("ScatterND", [X, np.array([[0], [2]]), X[1:]], {}),
    ("Slice", [X, ints(1), ints(3), ints(-1)], {}),
    ("Slice", [X, ints(-1, 0), ints(-100, 1000), ints(1, 0), ints(-2, 2)], {}),
    ("Slice", [X, ints(1, 1), ints(3, 3)], {}),
    ("Split", [X, ints(1, 3)], {"axis": 1}),
    ("Split", [X], {"axis": 0, "num_outputs": 2}),
    ("Squeeze", [X[:1, None], ints(1, -3)], {}),
    ("Squeeze", [X[:1, None]], {}),
    ("Tile", [X, ints(2, 1)], {}),
    ("Transpose", [X], {}),
    ("Transpose", [X[None]], {"perm": [2, 0, 1]}),
    ("Trilu", [X], {}),
    ("Trilu", [X, np.array(-1)], {"upper": 0}),
    ("Unsqueeze", [X, ints(0, -1)], {}),
    ("Where", [WHOLE, X, ROW], {}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_an_operator_gives_what_the_reference_gives(op, inputs, attributes):
    names = ["" if array is None else f"x{place}" for place, array in enumerate(inputs)]
    outputs = ["y0", "y1"] if op == "Split" else ["y0"]
    fed = {name: np.asarray(array) for name, array in zip(names, inputs, strict=True) if name}
    node = helper.make_node(op, names, outputs, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in fed.items()
    ]
    graph = helper.make_graph([node], "one", infos, [helper.make_empty_tensor_value_info(name) for name in outputs])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    expected = ReferenceEvaluator(proto).run(None, fed)
    model = ir.from_proto(proto)
    AddDefaultAttributesPass()(model)
    found = compute(model.graph[0], [None if array is None else np.asarray(array) for array in inputs])
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(one, other)


def test_every_function_has_a_case():
    assert {op for op, _, _ in CASES} == set(_FUNCTIONS)
    assert not can_compute("Conv")
