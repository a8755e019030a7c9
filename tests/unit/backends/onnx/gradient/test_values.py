"""Shapes for any number of images, and constants: from the graph alone, or by running what cannot be known from it."""

import numpy as np
import onnx.parser
import pytest

from heatlens_server.backends.onnx.gradient import values
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.inference import infer
from heatlens_server.backends.onnx.gradient.tape import BATCH
from heatlens_server.backends.onnx.gradient.values import facts_of, know
from heatlens_server.core.errors import ModelLoadError

RNG = np.random.default_rng(0)


def model_of(tmp_path, body, *, images="N", opset=20, **weights):
    text = f"""<ir_version: 10, opset_import: ["" : {opset}]>
        net (float[{images}, 3, 8, 8] x) => (float[] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for name, given in weights.items():
        array = RNG.normal(size=given).astype(np.float32) if isinstance(given, tuple) else np.asarray(given)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, tmp_path / "model.onnx")
    return read_file(tmp_path / "model.onnx")


def known_of(model):
    known = know(model, model.graph.inputs[0], (3, 8, 8))
    return known, {value.name: shape for value, shape in known.shapes.items()}


WINDOWS = """
    c = Conv <strides: ints = [2, 2]> (x, w)
    s = Shape(c)
    h = Gather <axis: int = 0> (s, two)
    n = Gather <axis: int = 0> (s, zero)
    f = Cast <to: int = 1> (h)
    g = Div(f, half)
    e = Floor(g)
    i = Cast <to: int = 7> (e)
    n1 = Unsqueeze(n, zero1)
    i1 = Unsqueeze(i, zero1)
    shape = Concat <axis: int = 0> (n1, minus, i1, i1)
    y = Reshape(c, shape)
"""
NUMBERS = {
    "two": np.array(2), "zero": np.array(0), "zero1": np.array([0]), "minus": np.array([-1]),
    "half": np.array(1.5, np.float32),
}  # fmt: skip


def test_shapes_that_are_computed_are_known_without_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "open_graph", None)
    model = model_of(tmp_path, WINDOWS, w=(4, 3, 2, 2), **NUMBERS)
    known, shapes = known_of(model)
    assert shapes["c"] == (BATCH, 4, 4, 4)
    assert shapes["y"] == (BATCH, 16, 2, 2)
    # What is the same for every image is a constant now, and what follows the batch is still computed.
    assert [node.op_type for node in model.graph] == ["Conv", "Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]
    concat = next(node for node in model.graph if node.op_type == "Concat")
    assert [known.constants[value].tolist() for value in concat.inputs[1:]] == [[-1], [2], [2]]
    assert concat.inputs[0] not in known.constants


def test_multiples_of_the_batch(tmp_path):
    body = """s = Shape <start: int = 0, end: int = 1> (x)
        n = Mul(s, four)
        shape = Concat <axis: int = 0> (n, rest)
        y = Reshape(x, shape)"""
    _known, shapes = known_of(model_of(tmp_path, body, four=np.array([4]), rest=np.array([3, 4, 4])))
    assert shapes["y"] == (4 * BATCH, 3, 4, 4)


def test_what_depends_on_pixels_is_run(tmp_path):
    """The indices of pixels above a threshold, of which the first is taken."""
    body = """flat = ReduceMax <keepdims: int = 0> (x, axes) places = NonZero(flat)
        many = Transpose(places) first = Slice(many, zero1, one1, zero1) y = Cast <to: int = 1> (first)"""
    model = model_of(tmp_path, body, axes=np.array([1, 2, 3]), zero1=np.array([0]), one1=np.array([1]))
    facts = infer(model, model.graph.inputs[0], (2, 3, 8, 8))
    names = {value.name for value in facts.unknown}
    assert "places" in names
    assert "flat" not in names
    _known, shapes = known_of(model)
    assert shapes["y"] == (1, 1)


def test_what_may_be_of_any_size_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr(values, "open_graph", None)
    body = """top = ReduceMax <keepdims: int = 0> (x) large = Mul(top, scale) count = Cast <to: int = 7> (large)
        size = Unsqueeze(count, zero1) y = ConstantOfShape(size)"""
    model = model_of(tmp_path, body, scale=np.float32(1e12), zero1=np.array([0]))
    facts = facts_of(model, model.graph.inputs[0], (2, 3, 8, 8))
    assert {value.name for value in facts.unbounded} == {"y"}
    assert model.graph.outputs[0] not in know(model, model.graph.inputs[0], (3, 8, 8)).shapes


def test_a_file_for_a_fixed_number_of_images(tmp_path):
    """The first axis of what is computed from the image is the images'."""
    model = model_of(
        tmp_path, "c = Conv(x, w) r = Reshape(c, shape) y = Add(r, bias)", images="1", w=(4, 3, 1, 1),
        shape=np.array([1, 4, 64]), bias=(1, 4, 1),
    )  # fmt: skip
    _known, shapes = known_of(model)
    assert (shapes["c"], shapes["y"], shapes["bias"]) == ((BATCH, 4, 8, 8), (BATCH, 4, 64), (1, 4, 1))


def test_large_weights_and_stored_integers_stay_as_they_are(tmp_path):
    """Folded, they would take more memory, and onnxruntime could not use its operators on integers."""
    body = """f = DequantizeLinear(w, scale) c = Conv(x, f) t = Transpose <perm: ints = [1, 0, 2, 3]> (c)
        b = Mul(table, table) y = Add(t, b)"""
    model = model_of(tmp_path, body, w=np.ones((4, 3, 1, 1), np.int8), scale=np.float32(0.1), table=(1200, 1, 1, 8, 8))
    _known, shapes = known_of(model)
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "Conv", "Transpose", "Mul", "Add"]
    assert shapes["y"] == (1200, 4, BATCH, 8, 8)


def test_what_does_not_fit_is_named(tmp_path):
    model = model_of(tmp_path, "r = Relu(x) y = MatMul(r, w)", w=(5, 4))
    with pytest.raises(ModelLoadError, match="operator MatMul of node '' does not fit its inputs"):
        known_of(model)
