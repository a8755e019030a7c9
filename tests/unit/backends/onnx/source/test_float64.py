"""Operators in float64 against onnxruntime and other implementations of them."""

import math

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_ir.passes.common import AddDefaultAttributesPass
from onnxruntime import InferenceSession

from heatlens_server.backends.onnx.source.float64 import Float64
from operator_cases import CASES, OPSET, Computed, arrays_of, case, forward_of, ints, name_of, runner, shape

IMAGE = shape(2, 4, 7, 6)
WINDOW = {"kernel_shape": [3, 3], "strides": [2, 2]}
MORE = [
    case("MaxPool", IMAGE, **WINDOW, pads=[0, 1, 1, 0], dilations=[2, 1], ceil_mode=1),
    case("AveragePool", IMAGE, **WINDOW, pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1),
    case("AveragePool", IMAGE, **WINDOW, pads=[1, 0, 0, 1], ceil_mode=1),
    case("Conv", IMAGE, shape(6, 2, 3, 2), shape(6), group=2, strides=[2, 1], auto_pad="SAME_LOWER"),
    case("ConvTranspose", IMAGE, shape(4, 3, 3, 2), shape(6), group=2, strides=[2, 1], output_padding=[1, 0]),
    case("ConvTranspose", IMAGE, shape(4, 3, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    case("LRN", IMAGE, size=3, alpha=0.5, beta=0.6, bias=1.2),
    case("LayerNormalization", shape(2, 3, 4), shape(4), shape(4)),
    case("ScatterElements", shape(3, 4), np.array([[0, 0, -1]]), shape(1, 3), reduction="max"),
    case("Resize", shape(1, 2, 7, 5), None, np.array([1, 1, 0.5, 1.3], np.float32), mode="cubic", antialias=1),
    case("Resize", shape(1, 2, 4, 8), None, None, ints(6, 6), axes=[2, 3], keep_aspect_ratio_policy="not_larger"),
]
# Of operators that are computed here: the reference implementation is no judge of itself.
OWN = {
    *("AffineGrid", "AveragePool", "Conv", "ConvTranspose", "Erf", "GatherElements", "Gelu", "GridSample", "LRN"),
    *("LayerNormalization", "LpNormalization", "MaxPool", "Mean", "Pad", "Resize", "ScatterElements", "ScatterND"),
}
OWN_CASES = [one for one in (*CASES, *MORE) if one.op in OWN]


def evaluated(model, feeds):
    """The outputs of a model of one operator, and those of onnxruntime's float64 or float32."""
    graph = ir.from_proto(model)
    AddDefaultAttributesPass()(graph)
    (node,) = graph.graph
    arrays = feeds | {name: value.const_value.numpy() for name, value in graph.graph.initializers.items()}
    inputs = [None if value is None else arrays[value.name] for value in node.inputs]
    return Float64(OPSET).run(node, inputs, rounding=True)


def by_onnxruntime(one, arrays):
    """In float32: onnxruntime lacks most of them in float64."""
    single = [
        array.astype(np.float32) if array is not None and array.dtype == np.float64 else array for array in arrays
    ]
    model = forward_of(one, single)
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    model.ir_version, model.opset_import[0].version = 10, 22
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: single[int(value.name[1:])] for value in session.get_inputs()})


@pytest.mark.parametrize("one", OWN_CASES, ids=[f"{n}-{name_of(one)}" for n, one in enumerate(OWN_CASES)])
def test_own_operators_are_onnxruntimes(one):
    arrays = arrays_of(one, np.random.default_rng(0))
    fed = {f"x{at}": arrays[at] for at, given in enumerate(one.inputs) if isinstance(given, tuple | Computed)}
    found = evaluated(forward_of(one, arrays), fed)
    expected = by_onnxruntime(one, arrays)[0]
    assert found[0].dtype == np.float64
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-5)


def test_every_operator_with_a_rule_runs_in_float64():
    rng = np.random.default_rng(0)
    for one in {one.op: one for one in CASES if one.op not in OWN}.values():
        arrays = arrays_of(one, rng)
        fed = {f"x{at}": arrays[at] for at, given in enumerate(one.inputs) if isinstance(given, tuple | Computed)}
        model = forward_of(one, arrays)
        found = evaluated(model, fed)
        for array, expected in zip(found, runner(one, model)(fed), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-12, atol=1e-12, err_msg=one.op)


def test_erf_is_exact():
    x = np.concatenate([np.random.default_rng(0).normal(size=2000) * 2, [-40.0, -6.0, -1e-9, 0.0, 1e-300, 6.0, 40.0]])
    node = ir.node("Erf", [ir.Value(name="x")])
    (found,) = Float64(OPSET).run(node, [x], rounding=True)
    np.testing.assert_allclose(found, [math.erf(value) for value in x], atol=3e-16, rtol=0)


def test_a_cast_to_a_narrower_type_rounds_nothing():
    x = np.array([1.0 + 1e-12])
    node = ir.node("Cast", [ir.Value(name="x")], {"to": int(ir.DataType.FLOAT16)})
    (found,) = Float64(OPSET).run(node, [x], rounding=True)
    assert found.dtype == np.float64
    assert found[0] == x[0]
    node = ir.node("Cast", [ir.Value(name="x")], {"to": int(ir.DataType.INT64)})
    assert Float64(OPSET).run(node, [x], rounding=True)[0].dtype == np.int64


QUANTISED = {
    "QuantizeLinear": (
        [np.linspace(-2, 2, 24, dtype=np.float32).reshape(2, 3, 4), np.array([0.01, 0.02, 0.4], np.float32),
         np.array([3, 0, -7], np.int8)],
        {"axis": 1},
    ),
    "DequantizeLinear": (
        [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.array(0.1, np.float32), np.array(5, np.uint8)], {},
    ),
    "DynamicQuantizeLinear": ([np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)], {}),
    "MatMulInteger": (
        [np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(8, dtype=np.int8).reshape(4, 2),
         np.array(7, np.uint8), np.array([1, 2], np.int8)],
        {},
    ),
    "ConvInteger": (
        [np.arange(32, dtype=np.uint8).reshape(1, 2, 4, 4), np.arange(36, dtype=np.uint8).reshape(2, 2, 3, 3),
         np.array(7, np.uint8), np.array(2, np.uint8)],
        {"pads": [1, 1, 1, 1]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", QUANTISED)
def test_quantised_operators_are_onnxruntimes_where_they_round(op):
    arrays, attributes = QUANTISED[op]
    names = [f"x{place}" for place in range(len(arrays))]
    outputs = [f"y{place}" for place in range(3 if op == "DynamicQuantizeLinear" else 1)]
    kinds = {"QuantizeLinear": TensorProto.INT8, "DequantizeLinear": TensorProto.FLOAT}
    graph = helper.make_graph(
        [helper.make_node(op, names, outputs, **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, arrays, strict=True)
        ],
        [helper.make_tensor_value_info(name, kinds.get(op, TensorProto.UNDEFINED), None) for name in outputs],
    )
    for output in graph.output if op not in kinds else ():
        output.ClearField("type")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = dict(zip(names, arrays, strict=True))
    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for found, expected in zip(evaluated(model, feeds), session.run(None, feeds), strict=True):
        assert found.dtype == (np.float64 if expected.dtype == np.float32 else expected.dtype)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_rounding_a_quantiser_clips():
    x, scale, zero_point = np.array([-3.0, 0.12345, 3.0]), np.array(0.01), np.array(0, np.uint8)
    node = ir.node(
        "QuantizeLinear", [ir.Value(name=name) for name in "xsz"], {"axis": 1, "output_dtype": 0, "saturate": 1}
    )
    (found,) = Float64(OPSET).run(node, [x, scale, zero_point], rounding=False)
    np.testing.assert_allclose(found, [0.0, 12.345, 255.0], rtol=1e-12)
