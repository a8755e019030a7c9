"""Operators of onnxruntime's own domain: the graph that is read computes what onnxruntime computes of the file."""

import numpy as np
import onnx
import onnx.parser
import pytest
from onnxruntime import InferenceSession

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.values import open_graph
from heatlens_server.core.errors import ModelLoadError

QUANTISED = "q = QuantizeLinear(x, scale, zero)"
CASES = {
    "Gelu": ("y = com.microsoft.Gelu(x)", {"Gelu"}),
    "BiasGelu": ("y = com.microsoft.BiasGelu(x, bias)", {"Add", "Gelu"}),
    "FastGelu": ("y = com.microsoft.FastGelu(x)", {"Gelu"}),
    "FastGelu with a bias": ("y = com.microsoft.FastGelu(x, bias)", {"Add", "Gelu"}),
    "QuickGelu": ("y = com.microsoft.QuickGelu <alpha: float = 1.5> (x)", {"Mul", "Sigmoid"}),
    "QuickGelu as it is by default": ("y = com.microsoft.QuickGelu (x)", {"Mul", "Sigmoid"}),
    "Trilu": ("y = com.microsoft.Trilu <upper: int = 0> (x)", {"Trilu"}),
    "GridSample": (
        'y = com.microsoft.GridSample <align_corners: int = 1, padding_mode: string = "border"> (x, places)',
        {"GridSample"},
    ),
    "16 bits": (
        "q = com.microsoft.QuantizeLinear(x, scale, zero16) y = com.microsoft.DequantizeLinear(q, scale, zero16)",
        {"DequantizeLinear", "QuantizeLinear"},
    ),
    "softmax over several axes": (
        f"""{QUANTISED} p = com.microsoft.QLinearSoftmax <axis: int = 1, opset: int = 11> (q, scale, zero, small, none)
        y = DequantizeLinear(p, small, none)""",
        {"DequantizeLinear", "Flatten", "QuantizeLinear", "Reshape", "Shape", "Softmax"},
    ),
    "choice": (
        f"""{QUANTISED} c = Less(x, zeros) p = com.microsoft.QLinearWhere(c, q, scale, zero, q, wide, zero, wide, zero)
        y = DequantizeLinear(p, wide, zero)""",
        {"DequantizeLinear", "Less", "QuantizeLinear", "Where"},
    ),
    "integers that are moved": (
        f"""{QUANTISED} t = Transpose <perm: ints = [0, 1, 3, 2]> (q) a, b = Split <axis: int = 1> (t, parts)
        y = DequantizeLinear(b, scale, zero)""",
        {"DequantizeLinear", "QuantizeLinear", "Split", "Transpose"},
    ),
}
RNG = np.random.default_rng(0)
CONSTANTS = {
    "bias": RNG.normal(size=8).astype(np.float32),
    "places": RNG.uniform(-1.2, 1.2, (1, 4, 4, 2)).astype(np.float32),
    "zeros": np.zeros(1, np.float32),
    "scale": np.float32(0.02),
    "wide": np.float32(0.03),
    "small": np.float32(1 / 256),
    "zero": np.uint8(120),
    "none": np.uint8(0),
    "zero16": np.uint16(30000),
    "parts": np.array([1, 2]),
}


def saved(path, body):
    text = f"""<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
        net (float[1, 3, 8, 8] x) => (float[a, b, c, d] y) {{ {body} }}"""
    proto = onnx.parser.parse_model(text)
    read = {name for node in proto.graph.node for name in node.input}
    for name, array in CONSTANTS.items():
        if name in read:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.save(proto, path)


@pytest.mark.parametrize(("body", "operators"), CASES.values(), ids=CASES)
def test_the_graph_that_is_read_is_of_onnx_own_operators_and_computes_the_same(tmp_path, body, operators):
    path = tmp_path / "model.onnx"
    saved(path, body)
    x = RNG.normal(size=(1, 3, 8, 8)).astype(np.float32)
    (expected,) = InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    model = read_file(path)
    assert {(node.domain, node.op_type) for node in model.graph} == {("", name) for name in operators}
    (found,) = open_graph(model).run(None, {"x": x})
    # Half an integer may be rounded either way.
    quantum = float(CONSTANTS["wide"]) if "QuantizeLinear" in operators else 0.0
    np.testing.assert_allclose(found, expected, atol=2e-6 + quantum)
    assert np.abs(found - expected).mean() < 1e-3


def test_a_form_that_is_not_understood_is_named(tmp_path):
    body = f"""{QUANTISED}
        p = com.microsoft.QLinearGlobalAveragePool <channels_last: int = 1> (q, scale, zero, scale, zero)
        y = DequantizeLinear(p, scale, zero)"""
    saved(tmp_path / "model.onnx", body)
    with pytest.raises(ModelLoadError, match=r"QLinearGlobalAveragePool of node '.*': channels_last"):
        read_file(tmp_path / "model.onnx")
