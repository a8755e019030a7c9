"""Backward passes of several operators, and what cannot be differentiated."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import AddDefaultAttributesPass

from heatlens_server.backends.onnx.gradient.differentiate import differentiate
from heatlens_server.backends.onnx.gradient.tape import BATCH, Known, NotDifferentiable

SHAPE = (2, 4)


def gradient_of(nodes, feeds, *, by="x", of="y", shapes=None, constants=()):
    """Run forward and backward pass; return dy/dx for a gradient of ones of y, float64."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, value.shape) for name, value in feeds.items()]
    outputs = [helper.make_tensor_value_info(of, TensorProto.DOUBLE, None)]
    graph = helper.make_graph(list(nodes), "net", inputs, outputs, list(constants))
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]))
    AddDefaultAttributesPass()(model)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    values |= {value.name: value for node in model.graph for value in node.outputs}
    known = {value: (shapes or {}).get(name, SHAPE) for name, value in values.items()}
    shape = next(iter(feeds.values())).shape
    seed = ir.Value(name="seed", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape(shape))
    array = {value: value.const_value.numpy() for value in model.graph.initializers.values()}
    wrt = values[by]
    backward = differentiate(list(model.graph), {values[of]: seed}, [wrt], Known(known, array, ir.DataType.DOUBLE, 20))
    result = backward.gradients[wrt]
    if result is None:
        return None
    model.graph.inputs.append(seed)
    model.graph.extend(backward.nodes)
    for value in backward.initializers:
        model.graph.register_initializer(value)
    result.type, result.shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape(shape)
    model.graph.outputs[:] = [result]
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {**feeds, "seed": np.ones(shape)})[0]


X = np.random.default_rng(0).uniform(0.5, 2.0, SHAPE)


def node(op, inputs, output, **attributes):
    return helper.make_node(op, inputs.split(), [output], name=f"node_{output}", **attributes)


def test_gradients_of_several_ways_add_up():
    found = gradient_of([node("Mul", "x x", "square"), node("Exp", "x", "e"), node("Add", "square e", "y")], {"x": X})
    np.testing.assert_allclose(found, 2 * X + np.exp(X), rtol=1e-12)


def test_an_inner_value_is_a_place_to_differentiate_by():
    nodes = [node("Exp", "x", "e"), node("Mul", "e e", "y")]
    np.testing.assert_allclose(gradient_of(nodes, {"x": X}, by="e"), 2 * np.exp(X), rtol=1e-12)


def test_what_follows_by_its_size_alone_has_no_gradient():
    nodes = [
        node("Shape", "x", "shape"),
        node("Cast", "shape", "float", to=TensorProto.DOUBLE),
        node("ReduceSum", "float", "count"),
        node("Mul", "other count", "y"),
    ]
    shapes = {"shape": (2,), "float": (2,), "count": (1, 1)}
    assert gradient_of(nodes, {"x": X, "other": X}, shapes=shapes) is None


def test_a_cast_to_integers_stops_gradients():
    nodes = [node("Cast", "x", "i", to=TensorProto.INT64), node("Cast", "i", "y", to=TensorProto.DOUBLE)]
    assert gradient_of(nodes, {"x": X}) is None
    floating = [node("Cast", "x", "f", to=TensorProto.DOUBLE), node("Mul", "f f", "y")]
    np.testing.assert_allclose(gradient_of(floating, {"x": X}), 2 * X, rtol=1e-12)


def test_an_operator_without_a_rule_is_named_with_its_node():
    with pytest.raises(NotDifferentiable, match="operator Det of node 'node_y'"):
        gradient_of([node("Det", "x", "y")], {"x": X})
    with pytest.raises(NotDifferentiable, match=r"operator com\.microsoft\.Gelu of node 'node_y'"):
        gradient_of([node("Gelu", "x", "y", domain="com.microsoft")], {"x": X})


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2, 3, 4], [12, 8, 6]), ([2, 0, 4], [0, 8, 0]), ([0, 0, 4], [0, 0, 0])],
)
def test_a_product_of_zeros(values, expected):
    shapes = {"x": (1, 3), "y": (1, 1)}
    product = helper.make_node("ReduceProd", ["x"], ["y"], keepdims=1)
    found = gradient_of([product], {"x": np.array([values], np.float64)}, shapes=shapes)
    np.testing.assert_array_equal(found, [expected])


def test_a_form_without_a_rule_is_named_with_its_node():
    nodes = [node("Concat", "x x", "y", axis=0)]
    with pytest.raises(NotDifferentiable, match="node 'node_y' cannot be differentiated: Concat of images"):
        gradient_of(nodes, {"x": X}, shapes={"x": (BATCH, 4), "y": (BATCH, 4)})


def test_local_response_normalisation():
    """By the formula of the specification: onnx's reference implementation sums over other channels."""
    rng = np.random.default_rng(0)
    x, alpha, beta, bias, size = rng.normal(size=(2, 5, 3, 3)), 0.3, 0.75, 1.5, 3

    def forward(x):
        squares = np.pad(x**2, ((0, 0), (1, 1), (0, 0), (0, 0)))
        return x / (bias + alpha / size * (squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:])) ** beta

    shapes = dict.fromkeys("xy", x.shape)
    lrn = helper.make_node("LRN", ["x"], ["y"], alpha=alpha, beta=beta, bias=bias, size=size)
    found = gradient_of([lrn], {"x": x}, shapes=shapes)
    step = 1e-6
    for _ in range(3):
        direction = rng.normal(size=x.shape)
        slope = (forward(x + step * direction) - forward(x - step * direction)).sum() / (2 * step)
        assert abs(slope - (found * direction).sum()) < 1e-7 * np.abs(found).sum()
