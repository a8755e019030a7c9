"""Changes of a graph's bytes: what the package onnx would have made, and what onnxruntime runs."""

import numpy as np
import onnx
import onnxruntime
import pytest

from heatlens_server.backends.onnx.graph_bytes import returning, taking_floats

TEXT = """
<ir_version: 9, opset_import: ["": 20]>
graph (uint8[N, 3] image, uint8[N, 3] other) => (float[N, 3] scores)
<float[3] weight = {1.0, 2.0, 3.0}>
{
  pixels = Cast <to: int = 1> (image)
  further = Cast <to: int = 1> (other)
  sums = Add (pixels, further)
  scores = Mul (sums, weight)
}
"""


@pytest.fixture
def model():
    return onnx.parser.parse_model(TEXT)


def run(graph: bytes, dtype):
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    pixels = np.arange(6, dtype=dtype).reshape(2, 3)
    outputs = session.run(None, {"image": pixels, "other": np.ones((2, 3), np.uint8)})
    return dict(zip([output.name for output in session.get_outputs()], outputs, strict=True))


def test_one_input_becomes_float(model):
    changed = taking_floats(model.SerializeToString(), "image")
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert onnx.ModelProto.FromString(changed) == model
    np.testing.assert_array_equal(run(changed, np.float32)["scores"], [[1, 4, 9], [4, 10, 18]])


def test_a_graph_without_that_input_stays_as_it_is(model):
    graph = model.SerializeToString()
    assert taking_floats(graph, "pixels") == graph


def test_values_become_outputs(model):
    changed = returning(model.SerializeToString(), ["sums", "pixels"])
    for name in ("sums", "pixels"):
        output = model.graph.output.add(name=name)
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert onnx.ModelProto.FromString(changed) == model
    found = run(changed, np.uint8)
    assert list(found) == ["scores", "sums", "pixels"]
    np.testing.assert_array_equal(found["sums"], [[1, 2, 3], [4, 5, 6]])


def test_long_names_and_many_outputs_are_written_right(model):
    names = ["x" * length for length in (1, 127, 128, 300, 20_000)]
    for name in names:
        model.graph.node.add(op_type="Identity", input=["sums"], output=[name])
    changed = onnx.ModelProto.FromString(returning(model.SerializeToString(), names))
    assert [output.name for output in changed.graph.output] == ["scores", *names]


def test_fields_of_every_kind_are_passed_over(model):
    # A float of 32 bits, a double of 64 and strings, in attributes and tensors before and after the inputs.
    node = model.graph.node.add(op_type="Selu", input=["sums"], output=["unused"])
    node.attribute.append(onnx.helper.make_attribute("alpha", 1.5))
    model.graph.initializer.append(onnx.helper.make_tensor("d", onnx.TensorProto.DOUBLE, [2], [1.0, 2.0]))
    model.metadata_props.add(key="k", value="v" * 200)
    model.model_version = 1 << 40
    changed = onnx.ModelProto.FromString(taking_floats(model.SerializeToString(), "other"))
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert changed == model
