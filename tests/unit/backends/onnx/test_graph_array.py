"""Closed forms as nodes of a graph: onnxruntime's results against the same functions on numpy's arrays in float64."""

import functools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxruntime import InferenceSession

from heatlens_server.backends.onnx.gradient.tape import Known, Tape
from heatlens_server.backends.onnx.graph_array import Functions, GraphArray, Length, write_map
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.maps.arrays import Namespace
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.normalization import normalize
from layer_cases import CASES, factors_of, layer_case

OPSET = 20
TYPES = {np.float16: ir.DataType.FLOAT16, np.float32: ir.DataType.FLOAT, np.float64: ir.DataType.DOUBLE}


def session_of(tape, inputs, outputs):
    """Open the graph of a tape in onnxruntime."""
    for number, output in enumerate(outputs):
        output.name = f"output_{number}"
    graph = ir.Graph(
        inputs, outputs, nodes=tape.nodes, initializers=tape.initializers, name="map", opset_imports={"": OPSET}
    )
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(model, full_check=True)
    return InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def input_of(name, shape, dtype):
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


@functools.cache
def graph_of(method, shape, dtype, classes=None):
    """What runs a method's graph for layers of a shape (C, h, w), and any N; any K unless it is given."""
    tape = Tape(Known({}, dtype=TYPES[dtype], opset=OPSET), lambda _: False, prefix="map")
    activations = input_of("activations", ("N", *shape), TYPES[dtype])
    each = shape[:1] if method is Method.CAM else shape
    factors = input_of("factors", ("N", classes or "K", *each), TYPES[dtype])
    outputs = write_map(tape, method, activations, factors, shape=shape, classes=classes)
    session = session_of(tape, [activations, factors], outputs)
    return lambda a, f: session.run(None, {"activations": a.astype(dtype), "factors": f.astype(dtype)})


def check(method, shape, kind, dtype, tolerance, *, classes=None):
    activations, gradients = layer_case(shape, kind)
    activations, gradients = (values.astype(dtype).astype(float) for values in (activations, gradients))
    factors = factors_of(method, gradients)
    cam, scale, offset = graph_of(method, shape[2:], dtype, classes)(activations, factors)
    assert cam.dtype == scale.dtype == offset.dtype == (np.float32 if dtype is np.float16 else dtype)
    assert cam.shape == (*shape[:2], *shape[3:])
    assert scale.shape == offset.shape == shape[:2]
    # The raw map, less what the ReLU takes: of a map that cancels, min-max would show nothing but rounding.
    expected = np.maximum(raw_map(method, activations, factors.astype(dtype).astype(float)), 0)
    found = cam * scale[..., None, None] + offset[..., None, None]
    size = np.abs(raw_map(method, activations, factors)).max()
    assert np.abs(found - expected).max() <= tolerance * max(size, 1e-300)
    span = cam.max(axis=(2, 3)) - cam.min(axis=(2, 3))
    assert np.array_equal(span, scale != 0)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 5e-5)])
@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_a_graph_says_what_numpy_says(method, dtype, tolerance):
    for shape, kind in CASES:
        check(method, shape, kind, dtype, tolerance)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_float16_accumulates_in_float32(method):
    assert check(method, (2, 2, 2048, 7, 7), "typical", np.float16, 1e-4).any(axis=(2, 3)).all()


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_one_graph_takes_any_number_of_images_and_classes(method):
    for images, classes in ((1, 1), (5, 2), (2, 7)):
        maps = check(method, (images, classes, 16, 7, 7), "typical", np.float32, 5e-5)
        assert maps.any(axis=(2, 3)).all()


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_a_known_number_of_classes(method):
    check(method, (4, 3, 16, 7, 7), "typical", np.float32, 5e-5, classes=3)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_no_shape_is_computed_where_the_classes_are_known(method):
    tape = Tape(Known({}, opset=OPSET), lambda _: False)
    write_map(tape, method, ir.Value(name="a"), ir.Value(name="f"), shape=(16, 7, 7), classes=3)
    operators = [node.op_type for node in tape.nodes]
    assert "Shape" not in operators
    if method is Method.GRAD_CAM:
        weights, sums = ["ReduceMean"], ["Reshape", "MatMul", "Reshape"]
        stretching = ["Relu", "ReduceMin", "ReduceMax", "Sub", "Sub", "Equal", "Where", "Div", "Squeeze", "Squeeze"]
        assert operators == [*weights, *sums, *stretching]


def test_non_finite_maps_stay_visible_and_alone():
    activations, gradients = layer_case((3, 2, 16, 7, 7))
    activations[1, 0, 2, 2] = np.nan
    cam, scale, _ = graph_of(Method.GRAD_CAM, (16, 7, 7), np.float32)(activations, gradients)
    assert not np.isfinite(cam[1]).all()
    assert np.isfinite(cam[[0, 2]]).all()
    assert np.isfinite(scale[[0, 2]]).all()


def test_every_function_of_a_namespace_is_there():
    wanted = {name for name in vars(Namespace) if not name.startswith("_")}
    assert wanted - set(vars(Functions)) == set()


class TestReshape:
    def array(self, *shape):
        self.tape = Tape(Known({}, opset=OPSET), lambda _: False)
        self.value = ir.Value(name="x")
        lengths = tuple(
            Length(self.value, axis) if isinstance(length, str) else length for axis, length in enumerate(shape)
        )
        return GraphArray(self.value, lengths, ir.DataType.FLOAT, self.tape)

    def sizes(self):
        """What the last Reshape is given; None if it is computed."""
        sizes = self.tape.nodes[-1].inputs[1].const_value
        return None if sizes is None else sizes.numpy().tolist()

    def test_what_stays_is_copied(self):
        array = self.array("N", "K", 3, 4)
        images, classes, _, _ = array.shape
        assert Functions().reshape(array, (images, classes, 12)).shape == (images, classes, 12)
        assert self.sizes() == [0, 0, 12]

    def test_the_rest_is_the_one_length_that_is_missing(self):
        array = self.array("N", 3, 4)
        assert Functions().reshape(array, (-1, 1, 3, 4)).shape == (array.shape[0], 1, 3, 4)
        assert self.sizes() == [0, 1, 3, 4]
        assert Functions().reshape(self.array(2, 3, 4), (-1, 4)).shape == (6, 4)

    def test_the_rest_is_a_new_length_where_several_are_merged(self):
        array = self.array("N", "K", 3)
        merged = Functions().reshape(array, (-1, 3))
        assert self.sizes() == [-1, 3]
        assert merged.shape == (Length(merged.value, 0), 3)
        assert Functions().reshape(merged, array.shape).shape == array.shape
        assert self.sizes() is None
        five = Functions().reshape(self.array("N", 5, 3), (-1, 3))
        assert five.shape == (Length(five.value, 0), 3)


def test_normalize_alone():
    tape = Tape(Known({}, opset=OPSET), lambda _: False)
    raw = input_of("raw", ("N", "K", 2, 2), ir.DataType.FLOAT)
    maps = normalize(GraphArray(raw, (Length(raw, 0), Length(raw, 1), 2, 2), ir.DataType.FLOAT, tape))
    outputs = [maps.values.value, maps.scale.value, maps.offset.value]
    for output, rank in zip(outputs, (4, 2, 2), strict=True):
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None] * rank)
    session = session_of(tape, [raw], outputs)
    values = np.array([[[[-2.0, 1.0], [3.0, 5.0]], [[2.0, 3.0], [4.0, 6.0]], [[7.0, 7.0], [7.0, 7.0]]]], np.float32)
    cam, scale, offset = session.run(None, {"raw": values})
    expected = [[[0.0, 0.2], [0.6, 1.0]], [[0.0, 0.25], [0.5, 1.0]], [[0.0, 0.0], [0.0, 0.0]]]
    np.testing.assert_allclose(cam, [expected], rtol=1e-6)
    assert scale.tolist() == [[5.0, 4.0, 0.0]]
    assert offset.tolist() == [[0.0, 2.0, 7.0]]
