"""Changes of a graph's bytes: what the package onnx would have made, and what onnxruntime runs."""

import numpy as np
import onnx
import onnxruntime
import pytest

from heatlens_server.backends.onnx.graph_bytes import external_initializers, raw_initializers, returning

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


def test_outputs_are_left_out(model):
    for name in ("sums", "pixels", "further"):
        model.graph.output.add(name=name).type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    changed = returning(model.SerializeToString(), ["scores", "pixels"])
    del model.graph.output[3], model.graph.output[1]
    assert onnx.ModelProto.FromString(changed) == model
    found = run(changed, np.uint8)
    assert list(found) == ["scores", "pixels"]
    np.testing.assert_array_equal(found["scores"], [[1, 4, 9], [4, 10, 18]])


def test_long_names_and_many_outputs_are_read_right(model):
    names = ["x" * length for length in (1, 127, 128, 300, 20_000)]
    for name in names:
        model.graph.node.add(op_type="Identity", input=["sums"], output=[name])
        model.graph.output.add(name=name)
    for kept in (names[:3], [names[-1]], names):
        changed = onnx.ModelProto.FromString(returning(model.SerializeToString(), kept))
        assert [output.name for output in changed.graph.output] == kept


def test_fields_of_every_kind_are_passed_over(model):
    # A float of 32 bits, a double of 64 and strings, in attributes and tensors.
    node = model.graph.node.add(op_type="Selu", input=["sums"], output=["unused"])
    node.attribute.append(onnx.helper.make_attribute("alpha", 1.5))
    model.graph.initializer.append(onnx.helper.make_tensor("d", onnx.TensorProto.DOUBLE, [2], [1.0, 2.0]))
    model.metadata_props.add(key="k", value="v" * 200)
    model.model_version = 1 << 40
    model.graph.output.add(name="unused")
    changed = onnx.ModelProto.FromString(returning(model.SerializeToString(), ["scores"]))
    del model.graph.output[1]
    assert changed == model


def test_weights_are_found_where_their_bytes_are(model):
    values = np.arange(300, dtype=np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "raw"))
    outside = model.graph.initializer.add(name="outside", dims=[3], data_location=onnx.TensorProto.EXTERNAL)
    outside.external_data.add(key="location", value="weights")
    graph = model.SerializeToString()
    assert external_initializers(graph) == ["outside"]
    # The other one holds its numbers as such.
    ((name, (start, end)),) = raw_initializers(graph).items()
    assert (name, graph[start:end]) == ("raw", values.tobytes())
