"""Operators that ONNX defines by others, through a file: read, inlined, differentiated, compared with differences."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from heatlens_server.backends.onnx.gradient.differentiate import differentiate
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.values import know

STEP = 1e-6
TOLERANCE = 1e-6

HEADS = "q_num_heads: int = 2, kv_num_heads: int = 2"
CASES = {
    "attention over images": (23, (2, 3, 4), "y = Attention (x, x, x)"),
    "attention over tokens": (23, (3, 8), f"y = Attention <{HEADS}> (x, x, x)"),
    "attention with a mask": (23, (3, 8), f"m = Trilu <upper: int = 0> (c33) y = Attention <{HEADS}> (x, x, x, m)"),
    "causal attention": (24, (3, 8), f"y = Attention <{HEADS}, is_causal: int = 1, scale: float = 0.7> (x, x, x)"),
    "capped attention": (24, (3, 8), f"y = Attention <{HEADS}, softcap: float = 2.0> (x, x, x)"),
    "attention of shared keys": (
        24,
        (3, 8),
        "k = MatMul(x, c84) y = Attention <q_num_heads: int = 4, kv_num_heads: int = 2> (x, k, k)",
    ),
    "RMSNormalization": (23, (3, 8), "y = RMSNormalization (x, c8)"),
    "RMSNormalization of two axes": (24, (3, 8), "y = RMSNormalization <axis: int = -2> (x, c38)"),
    "GroupNormalization": (21, (8, 3, 3), "y = GroupNormalization <num_groups: int = 4> (x, c8, c8)"),
    "GroupNormalization of groups": (18, (6, 3, 3), "y = GroupNormalization <num_groups: int = 3> (x, c3, c3)"),
    "RotaryEmbedding": (23, (2, 3, 4), "y = RotaryEmbedding (x, c132, c132)"),
    "CastLike": (19, (3, 4), "d = CastLike(c34, x) y = Mul(x, d)"),
}  # fmt: skip


def saved(path, opset, shape, body):
    """A model of one float64 input x (N, ...), whose constants cAB are random numbers (A, B)."""
    dims = ", ".join(str(length) for length in shape)
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> net (double[N, {dims}] x) => (double[] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    names = {name for node in proto.graph.node for name in node.input if name[1:].isdigit()}
    arrays = {name: rng.uniform(0.5, 2.0, [int(length) for length in name[1:]]) for name in sorted(names)}
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(proto, path)
    return proto


@pytest.mark.parametrize(("opset", "shape", "body"), CASES.values(), ids=CASES)
def test_an_operator_that_onnx_defines_by_others(tmp_path, opset, shape, body):
    proto = saved(tmp_path / "model.onnx", opset, shape, body)
    model = read_file(tmp_path / "model.onnx")
    known = know(model, x := model.graph.inputs[0], shape)
    y = model.graph.outputs[0]
    seed = ir.Value(name="seed", type=ir.TensorType(ir.DataType.DOUBLE), shape=ir.Shape([None] * len(known.shapes[y])))
    backward = differentiate(list(model.graph), {y: seed}, [x], known)
    model.graph.inputs.append(seed)
    model.graph.extend(backward.nodes)
    for value in backward.initializers:
        model.graph.register_initializer(value)
    model.graph.outputs.append(backward.gradients[x])
    backward.gradients[x].type = ir.TensorType(ir.DataType.DOUBLE)
    rng = np.random.default_rng(1)
    image, direction = rng.normal(size=(2, *shape)), rng.normal(size=(2, *shape))
    (output,) = ReferenceEvaluator(proto).run(None, {"x": image})
    feeds, run = {"seed": rng.normal(size=output.shape)}, ReferenceEvaluator(ir.to_proto(model)).run
    found, gradient = run(None, {"x": image, **feeds})
    # Some operators compute in float32 by themselves.
    np.testing.assert_allclose(found, output, rtol=1e-5, atol=1e-6)
    ahead, behind = (run(None, {"x": image + sign * STEP * direction, **feeds})[0] for sign in (1, -1))
    slope = ((ahead - behind) * feeds["seed"]).sum() / (2 * STEP)
    assert abs(slope - (gradient * direction).sum()) < TOLERANCE * np.abs(gradient * direction).sum()
