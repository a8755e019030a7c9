"""Files that onnxruntime's tool quantised, in each of its formats: read, differentiated, compared.

Against differences in float64 of the same graph without rounding, which is what straight-through gradients are of, and
against the map of the file before it was quantised.
"""

import numpy as np
import onnx
import onnx.parser
import onnx.version_converter
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import _conv_implementation
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from heatlens_server.backends.onnx.gradient.differentiate import differentiate
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_layers, find_scores
from heatlens_server.backends.onnx.gradient.values import know, open_graph
from heatlens_server.core.grid import Layout

SIZE, CLASSES = 24, 6
STEP, TOLERANCE = 1e-6, 1e-6
LEAST_CORRELATION = 0.97

CONVOLUTIONS = """net (float[N, 3, 24, 24] image) => (float[N, 6] logits) {
    a = Conv <pads: ints = [1, 1, 1, 1], strides: ints = [2, 2]> (image, w_32_3_3_3, b_32)
    ar = Relu(a)
    p = MaxPool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (ar)
    g = Conv <pads: ints = [1, 1, 1, 1], group: int = 4> (p, w_32_8_3_3, c_32)
    s = Add(g, p)
    sr = Relu(s)
    t = Concat <axis: int = 1> (p, sr)
    u = Conv <pads: ints = [1, 1, 1, 1]> (t, w_48_64_3_3, b_48)
    v = LeakyRelu <alpha: float = 0.1> (u)
    q = AveragePool <kernel_shape: ints = [2, 2], strides: ints = [2, 2]> (v)
    m = GlobalAveragePool(q)
    e = Conv(m, w_48_48_1_1)
    f = Sigmoid(e)
    h = Mul(q, f)
    hr = Relu(h)
    o = GlobalAveragePool(hr)
    k = Flatten(o)
    logits = Gemm <transB: int = 1> (k, w_6_48, b_6)
}"""
TOKENS = """net (float[N, 3, 24, 24] image) => (float[N, 6] logits) {
    e = Conv <strides: ints = [6, 6]> (image, w_32_3_6_6, b_32)
    shape = Constant <value_ints: ints = [0, 32, 16]> ()
    r = Reshape(e, shape)
    x = Transpose <perm: ints = [0, 2, 1]> (r)
    n = LayerNormalization(x, s_32, b_32)
    q = MatMul(n, w_32_32)
    k = MatMul(n, v_32_32)
    kt = Transpose <perm: ints = [0, 2, 1]> (k)
    z = MatMul(q, kt)
    a = Softmax(z)
    v = MatMul(a, n)
    y = Add(x, v)
    l = LayerNormalization(y, s_32, c_32)
    i = MatMul(l, w_32_64)
    j = HardSwish(i)
    o = MatMul(j, w_64_32)
    t = Add(y, o)
    axis = Constant <value_ints: ints = [1]> ()
    m = ReduceMean <keepdims: int = 0> (t, axis)
    logits = Gemm <transB: int = 1> (m, w_6_32, b_6)
}"""
NETWORKS = {"convolutions": CONVOLUTIONS, "tokens": TOKENS}
STATIC = {
    "QDQ per channel": {"quant_format": QuantFormat.QDQ, "per_channel": True},
    "QDQ of unsigned numbers": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8},
    "QDQ of 16 bits": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt16},
    "QDQ of 16 bits by onnxruntime's operators": {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QInt16,
        "extra_options": {"UseQDQContribOps": True},
    },
    "QDQ of opset 21": {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QInt8},
    "QOperator": {"quant_format": QuantFormat.QOperator},
    "QOperator per channel": {"quant_format": QuantFormat.QOperator, "per_channel": True},
}


class Photos(CalibrationDataReader):
    """Noise in blocks of 4 pixels, as photos have parts."""

    def __init__(self):
        self.left = iter([{"image": photo(number)} for number in range(4)])

    def get_next(self):
        return next(self.left, None)


def photo(number):
    blocks = np.random.default_rng(number).normal(size=(1, 3, SIZE // 4, SIZE // 4))
    return blocks.repeat(4, 2).repeat(4, 3).astype(np.float32)


@pytest.fixture(scope="module", params=NETWORKS)
def original(request, tmp_path_factory):
    """The file of a network with random weights; their names end in their shapes."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {NETWORKS[request.param]}')
    rng = np.random.default_rng(0)
    for name in sorted({name for node in proto.graph.node for name in node.input if name[1:2] == "_"}):
        shape = [int(length) for length in name.split("_")[1:]]
        inputs = np.prod(shape[1:]) if len(shape) != 2 else max(shape)
        array = rng.normal(size=shape) * np.sqrt(1.5 / inputs) if len(shape) > 1 else rng.uniform(0.0, 0.2, shape)
        array += name[0] == "s"
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    path = tmp_path_factory.mktemp("float") / "model.onnx"
    onnx.save(proto, path)
    return path


@pytest.fixture(scope="module", params=[*STATIC, "dynamic", "dynamic per channel"])
def quantised(request, original, tmp_path_factory):
    """The file, quantised."""
    source = original
    path = tmp_path_factory.mktemp("quantised") / "model.onnx"
    if request.param in STATIC:
        if "21" in request.param:
            original = path.parent / "newer.onnx"
            onnx.save(onnx.version_converter.convert_version(onnx.load(source), 21), original)
        quantize_static(original, path, Photos(), **STATIC[request.param])
    else:
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8, per_channel="per" in request.param)
    return path


def explained(path, *, by_image=False):
    """A model with a gradient, and the layer.

    Returns:
        The model, from image and seed (N, classes) to logits, the default layer, and the gradient by that or by the
        image; and the layer.
    """
    model = read_file(path)
    image = find_image(model)
    known = know(model, image.value, image.shape(SIZE, SIZE))
    scores = find_scores(model, known)
    layer = find_layers(model, known, image, scores)[0]
    seed = ir.Value(name="seed", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, CLASSES]))
    by = image.value if by_image else layer.value
    backward = differentiate(list(model.graph), {scores.value: seed}, [by], known)
    model.graph.inputs.append(seed)
    model.graph.extend(backward.nodes)
    for value in backward.initializers:
        model.graph.register_initializer(value)
    model.graph.outputs[:] = [scores.value, layer.value, backward.gradients[by]]
    return model, layer


def grad_cam(path, image):
    """Logits (classes,), and the map of class 0 before ReLU, (places,)."""
    model, layer = explained(path)
    feeds = {"image": image, "seed": np.eye(CLASSES, dtype=np.float32)[:1]}
    logits, activations, gradient = open_graph(model).run(None, feeds)
    if layer.grid.layout is Layout.TOKENS:
        activations, gradient = (array[:, layer.grid.prefix :].swapaxes(1, 2) for array in (activations, gradient))
    places = [array.reshape(layer.channels, -1) for array in (activations, gradient)]
    return logits[0], places[1].mean(1) @ places[0]


def test_the_map_is_that_of_the_float_network(original, quantised):
    """Correlations 0.979 to 0.9999: the networks have random weights, and few values for each place."""
    logits, raw = grad_cam(quantised, photo(9))
    original_logits, original_raw = grad_cam(original, photo(9))
    assert np.abs(logits - original_logits).max() < 0.2
    assert np.corrcoef(raw, original_raw)[0, 1] > LEAST_CORRELATION
    session = InferenceSession(quantised, providers=["CPUExecutionProvider"])
    # A number of the quantised output more or less: onnxruntime fuses what is on integers differently.
    np.testing.assert_allclose(logits, session.run(None, {"image": photo(9)})[0][0], atol=0.1)


def test_what_is_clipped_has_no_gradient(tmp_path):
    """Of unsigned numbers of zero point 2: -0.2 to 25.3."""
    text = """<ir_version: 10, opset_import: ["" : 20]> net (float[N, 4] x) => (float[N, 4] y) {
        scale = Constant <value_float: float = 0.1> ()
        zero = Constant <value = uint8 {2}> ()
        q = QuantizeLinear(x, scale, zero)
        y = DequantizeLinear(q, scale, zero)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "model.onnx")
    model = read_file(tmp_path / "model.onnx")
    x, y = model.graph.inputs[0], model.graph.outputs[0]
    seed = ir.Value(name="seed", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 4]))
    backward = differentiate(list(model.graph), {y: seed}, [x], know(model, x, (4,)))
    model.graph.inputs.append(seed)
    model.graph.extend(backward.nodes)
    for value in backward.initializers:
        model.graph.register_initializer(value)
    model.graph.outputs[:] = [backward.gradients[x]]
    feeds = {"x": np.array([[-0.3, -0.1, 25.2, 25.4]], np.float32), "seed": np.float32([[1, 2, 3, 4]])}
    np.testing.assert_allclose(open_graph(model).run(None, feeds)[0], [[0, 2, 3, 0]], rtol=1e-6)


# Without rounding.


class QuantizeLinear(OpRun):
    def _run(self, x, scale, zero_point, **_attributes):
        ends = np.iinfo(zero_point.dtype)
        return (np.clip(x / scale + zero_point, ends.min, ends.max),)


class DequantizeLinear(OpRun):
    def _run(self, x, scale, zero_point=None, axis=1, **_attributes):
        shape = [-1 if place == axis % x.ndim else 1 for place in range(x.ndim)] if np.size(scale) > 1 else []
        shift = 0.0 if zero_point is None else np.asarray(zero_point, np.float64).reshape(shape)
        return ((x - shift) * np.asarray(scale, np.float64).reshape(shape),)


class DynamicQuantizeLinear(OpRun):
    def _run(self, x):
        scale = (max(x.max(), 0) - min(x.min(), 0)) / 255
        zero_point = np.uint8(np.round(-min(x.min(), 0) / scale))
        return x / scale + zero_point, np.float64(scale), zero_point


class ConvInteger(OpRun):
    def _run(self, x, weights, x_zero_point, zero_point, dilations, group, kernel_shape=None, pads=None, strides=None,
             auto_pad=None):  # fmt: skip
        shift = np.asarray(zero_point, np.float64).reshape(-1, *[1] * (weights.ndim - 1) if zero_point.ndim else [])
        return (
            _conv_implementation(
                x - np.float64(x_zero_point), weights - shift, None, auto_pad, dilations, group,
                list(weights.shape[2:]), pads, strides,
            ),
        )  # fmt: skip


class MatMulInteger(OpRun):
    def _run(self, a, b, a_zero_point, b_zero_point):
        return ((a - np.float64(a_zero_point)) @ (b - np.asarray(b_zero_point, np.float64)),)


WITHOUT_ROUNDING = [QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear, ConvInteger, MatMulInteger]


def in_float64(model):
    """What runs a model in float64, and without rounding to integers."""
    for value in model.graph.initializers.values():
        if value.const_value.dtype is ir.DataType.FLOAT:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float64), name=value.name)
            value.type = ir.TensorType(ir.DataType.DOUBLE)
    for node in model.graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == TensorProto.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", TensorProto.DOUBLE)
        if node.op_type == "ConstantOfShape":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.zeros(1)))
    return ReferenceEvaluator(ir.to_proto(model), new_ops=WITHOUT_ROUNDING)


def test_the_gradient_is_that_of_the_network_without_rounding(quantised):
    rng = np.random.default_rng(0)
    model, _layer = explained(quantised, by_image=True)
    image, direction = photo(9).astype(np.float64), rng.normal(size=(1, 3, SIZE, SIZE))
    image += 0.01 * rng.normal(size=image.shape)
    seed = rng.normal(size=(1, CLASSES))
    run = in_float64(model).run
    _logits, _layer, gradient = run(None, {"image": image, "seed": seed})
    ahead, behind = (run(None, {"image": image + sign * STEP * direction, "seed": seed})[0] for sign in (1, -1))
    slope = ((ahead - behind) * seed).sum() / (2 * STEP)
    assert abs(slope - (gradient * direction).sum()) < TOLERANCE * np.abs(gradient * direction).sum()
