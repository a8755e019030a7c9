"""ONNX files of anybody's: what is read of them, and what is refused by name."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from heatlens_server.backends.onnx.gradient.file import OLDEST_OPSET, read_file
from heatlens_server.backends.onnx.gradient.tape import BATCH
from heatlens_server.backends.onnx.gradient.values import know, open_graph
from heatlens_server.core.errors import ModelLoadError

FLOAT = TensorProto.FLOAT
IMAGE = helper.make_tensor_value_info("image", FLOAT, ["n", 3, 8, 8])
LOGITS = helper.make_tensor_value_info("logits", FLOAT, None)


def weights(name, *shape):
    return numpy_helper.from_array(np.random.default_rng(0).normal(size=shape).astype(np.float32), name)


def model_of(*nodes, initial=(), opset=17, functions=(), opsets=()):
    graph = helper.make_graph(list(nodes), "net", [IMAGE], [LOGITS], list(initial))
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in opsets)]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)


def classifier(opset=17):
    """Convolution, pooling, and a linear layer, with an Identity and a Constant as exporters leave them."""
    shape = helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([-1, 16]), "v"))
    return model_of(
        helper.make_node("Conv", ["image", "w1"], ["conv"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("Identity", ["relu"], ["same"]),
        helper.make_node("GlobalAveragePool", ["same"], ["pooled"]),
        shape,
        helper.make_node("Reshape", ["pooled", "shape"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w2"], ["logits"]),
        initial=[weights("w1", 16, 3, 3, 3), weights("w2", 16, 5)],
        opset=opset,
    )


def saved(tmp_path, model):
    path = tmp_path / "model.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


@pytest.mark.parametrize("opset", [9, 13, 17, 21])
def test_a_file_of_any_opset_gives_the_same_graph_and_scores(tmp_path, opset):
    model = read_file(saved(tmp_path, classifier(opset)))
    assert model.graph.opset_imports[""] == max(opset, OLDEST_OPSET)
    assert [node.op_type for node in model.graph] == ["Conv", "Relu", "GlobalAveragePool", "Reshape", "MatMul"]
    image = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    (expected,) = ReferenceEvaluator(classifier(opset)).run(None, {"image": image})
    (found,) = open_graph(model).run(None, {"image": image})
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("size", [(12, 12), (14, 11)])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10)])
def test_old_resizing_keeps_its_places(tmp_path, op, opset, size, mode):
    scales = [1.0, 1.0, size[0] / 8, size[1] / 8]
    attributes = {"mode": mode, **({"scales": scales} if opset == 7 else {})}
    inputs = ["image"] if opset == 7 else ["image", "scales"]
    initial = [] if opset == 7 else [numpy_helper.from_array(np.array(scales, np.float32), "scales")]
    proto = model_of(helper.make_node(op, inputs, ["logits"], **attributes), initial=initial, opset=opset)
    image = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    session = InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = open_graph(read_file(saved(tmp_path, proto))).run(None, {"image": image})
    np.testing.assert_allclose(found, session.run(None, {"image": image})[0], atol=1e-6)


@pytest.mark.parametrize(("kind", "tolerance"), [(TensorProto.FLOAT16, 2e-2), (TensorProto.DOUBLE, 1e-5)])
def test_all_is_computed_in_one_type_of_numbers(tmp_path, kind, tolerance):
    """A network of single precision with an island of another."""
    proto = classifier()
    proto.graph.node[0].input[0] = "cast"
    proto.graph.node.insert(0, helper.make_node("Cast", ["image"], ["other"], to=kind))
    proto.graph.node.insert(1, helper.make_node("Add", ["other", "half"], ["sum"]))
    proto.graph.node.insert(2, helper.make_node("Cast", ["sum"], ["cast"], to=TensorProto.FLOAT))
    half = np.array(0.5, helper.tensor_dtype_to_np_dtype(kind))
    proto.graph.initializer.append(numpy_helper.from_array(half, "half"))
    model = read_file(saved(tmp_path, proto))
    known = know(model, model.graph.inputs[0], (3, 8, 8))
    kinds = {value.dtype for value in model.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT, ir.DataType.INT64}
    assert known.dtype is ir.DataType.FLOAT
    image = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    (expected,) = ReferenceEvaluator(proto).run(None, {"image": image})
    (found,) = open_graph(model).run(None, {"image": image})
    np.testing.assert_allclose(found, expected, atol=tolerance)


def test_shapes_are_known_for_any_batch(tmp_path):
    model = read_file(saved(tmp_path, classifier()))
    known = know(model, model.graph.inputs[0], (3, 8, 8))
    by_name = {value.name: shape for value, shape in known.shapes.items()}
    assert by_name["conv"] == (BATCH, 16, 8, 8)
    assert by_name["logits"] == (BATCH, 5)
    assert by_name["w1"] == (16, 3, 3, 3)


def test_functions_of_the_file_are_inlined(tmp_path):
    halved = helper.make_function(
        "mine", "Half", ["x"], ["y"],
        [helper.make_node("Constant", [], ["two"], value_float=2.0), helper.make_node("Div", ["x", "two"], ["y"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    model = model_of(
        helper.make_node("Half", ["image"], ["half"], domain="mine"),
        helper.make_node("ReduceMean", ["half"], ["logits"], axes=[2, 3], keepdims=0),
        functions=[halved],
        opsets=["mine"],
    )
    assert [node.op_type for node in read_file(saved(tmp_path, model)).graph] == ["Div", "ReduceMean"]


def test_attributes_of_functions(tmp_path):
    """A default that is kept, and one that is overridden."""
    scaled = helper.make_function(
        "mine", "Scaled", ["x"], ["y"],
        [
            helper.make_node("Constant", [], ["factor"]),
            helper.make_node("Mul", ["x", "factor"], ["y"]),
        ],
        [helper.make_opsetid("", 17)],
        attribute_protos=[helper.make_attribute("by", 3.0)],
    )  # fmt: skip
    scaled.node[0].attribute.add(name="value_float", ref_attr_name="by", type=onnx.AttributeProto.FLOAT)
    proto = model_of(
        helper.make_node("Scaled", ["image"], ["a"], domain="mine"),
        helper.make_node("Scaled", ["a"], ["b"], domain="mine", by=0.5),
        helper.make_node("ReduceMean", ["b"], ["logits"], axes=[2, 3], keepdims=0),
        functions=[scaled],
        opsets=["mine"],
    )
    image = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    (found,) = open_graph(read_file(saved(tmp_path, proto))).run(None, {"image": image})
    np.testing.assert_allclose(found, 1.5 * image.mean((2, 3)), rtol=1e-5)


def test_nodes_in_any_order_and_weights_of_every_kind(tmp_path):
    """Constant nodes of each form, small and large ones; weights beside the file; initialisers among the inputs."""
    large, small = weights("large", 3, 300), weights("small", 3)
    data = numpy_helper.to_array(large).tobytes()
    (tmp_path / "weights.bin").write_bytes(numpy_helper.to_array(small).tobytes() + data)
    for tensor, offset, length in ((small, 0, 12), (large, 12, len(data))):
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "weights.bin", "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
    inner = numpy_helper.from_array(np.full((300, 5), 0.01, np.float32), "unnamed")
    proto = model_of(
        helper.make_node("Add", ["product", "shift"], ["logits"]),
        helper.make_node("MatMul", ["wide", "inner"], ["product"]),
        helper.make_node("MatMul", ["moved", "large"], ["wide"]),
        helper.make_node("Add", ["mean", "small"], ["moved"]),
        helper.make_node("ReduceMean", ["image"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Constant", [], ["inner"], value=inner),
        helper.make_node("Constant", [], ["shift"], value_floats=[1.0, 2.0, 3.0, 4.0, 5.0]),
        initial=[large, small],
    )
    proto.graph.input.append(helper.make_tensor_value_info("small", FLOAT, [3]))
    path = saved(tmp_path, proto)
    image = np.random.default_rng(1).random((2, 3, 8, 8), np.float32)
    model = read_file(path)
    # In place: what is read already stays.
    (tmp_path / "weights.bin").write_bytes(b"another")
    (found,) = open_graph(model).run(None, {"image": image})
    kernel = numpy_helper.to_array(weights("large", 3, 300))
    moved = image.mean((2, 3)) + numpy_helper.to_array(weights("small", 3))
    np.testing.assert_allclose(found, moved @ kernel @ np.full((300, 5), 0.01) + np.arange(1, 6), rtol=1e-4)
    assert [value.name for value in model.graph.inputs] == ["image"]


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'no\.onnx' cannot be read"):
        read_file(tmp_path / "no.onnx")
