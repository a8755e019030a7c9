"""ONNX files of anybody's: what is read of them, and what is refused by name."""

import numpy as np
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


def with_external(location, **entries):
    model = classifier()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return model


def claims_two_gigabytes():
    model = classifier()
    model.graph.initializer[0].dims[:] = [1 << 16, 1 << 13]
    return model


def cyclic():
    return model_of(
        helper.make_node("Add", ["image", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Relu", ["b"], ["logits"]),
    )


def looping():
    body = helper.make_graph([], "body", [], [])
    return model_of(helper.make_node("Loop", ["", "", "image"], ["logits"], name="for_ever", body=body))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"no file at all", "is no ONNX file"),
        (b"", "no operators"),
        (with_external("../w1.bin"), "'w1' lies outside"),
        (with_external("/etc/passwd"), "'w1' lies outside"),
        (with_external("missing.bin"), "'w1' cannot be read"),
        (with_external("model.onnx", offset=10**9), "'w1' is too short"),
        (with_external("model.onnx", offset=-5), "'w1' is too short"),
        (with_external("model.onnx", offset="x"), "'w1' cannot be read"),
        (claims_two_gigabytes(), "'w1' says 2147483648 bytes"),
        (cyclic(), "model.onnx"),
        (looping(), "Loop of node 'for_ever'"),
        (
            model_of(helper.make_node("FusedConv", ["image"], ["logits"], domain="com.microsoft", name="f")),
            "com.microsoft.FusedConv of node 'f'",
        ),
        (model_of(helper.make_node("NoSuchOperator", ["image"], ["logits"])), "NoSuchOperator"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_and_no_path(tmp_path, model, words):
    with pytest.raises(ModelLoadError) as caught:
        open_graph(read_file(saved(tmp_path, model)))
    assert words in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'no\.onnx' cannot be read"):
        read_file(tmp_path / "no.onnx")
