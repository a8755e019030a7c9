"""The judge of gradients sees every rule that is wrong, and passes those that are right."""

from functools import partial

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import AddDefaultAttributesPass
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from fixed_batch_networks import PX, Dense, Excited, Grouped, Residual, Tokens, Windows, export, seeded
from heatlens_server.backends.onnx.gradient import differentiate
from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import find_image, find_layers, find_scores
from heatlens_server.backends.onnx.gradient.tape import Known
from heatlens_server.backends.onnx.gradient.values import know, noise_for
from heatlens_server.backends.onnx.packed import open_packed
from heatlens_server.backends.onnx.providers import load_runtime
from heatlens_server.backends.onnx.source import float64
from heatlens_server.backends.onnx.source.batch import free_batch
from heatlens_server.backends.onnx.source.judge import gradient_by, judge
from heatlens_server.backends.onnx.source.split import split
from operator_cases import CASES, OPSET, Computed, arrays_of, backward_of, forward_of, name_of, runner

RIGHT = 1e-6
"""A right gradient is off by less than this, share of its length."""

# One case of every operator, and the place of each operand by which it is differentiated.
ONE_EACH = {one.op: one for one in reversed(CASES)}
OPERANDS = [(one, place) for one in ONE_EACH.values() for place in one.by]


def verdict_on(one, place):
    """Judge the gradient of one operator by one of its operands, both passes in float64."""
    rng = np.random.default_rng(0)
    arrays = arrays_of(one, rng)
    proto = forward_of(one, arrays)
    fed = {f"x{at}": arrays[at] for at, given in enumerate(one.inputs) if isinstance(given, tuple | Computed)}
    outputs = runner(one, proto)(fed)
    count = 1 if one.op == "TopK" else one.outputs
    model = ir.from_proto(proto)
    AddDefaultAttributesPass()(model)
    values = {value.name: value for value in model.graph.inputs}
    backward = runner(one, backward_of(one, arrays, outputs))

    def gradient_at(told, seeds):
        weights = {f"g{at}": seeds[f"y{at}"] for at in range(count)}
        gradients = backward(fed | {f"x{place}": told[f"x{place}"]} | weights)
        return gradients[one.by.index(place)]

    return judge(
        model,
        Known({}, {}, ir.DataType.DOUBLE, OPSET),
        layer=values[f"x{place}"],
        scores=list(model.graph.outputs)[:count],
        forward=fed | {f"y{at}": output for at, output in enumerate(outputs)},
        gradient_at=gradient_at,
    )


def scaled(rule, factor, node, gradients, tape):
    """A rule whose gradients are multiplied by a factor."""
    found = rule(node, gradients, tape)
    return [value if value is None else tape.op("Mul", value, tape.number(factor)) for value in found]


@pytest.mark.parametrize(("one", "place"), OPERANDS, ids=[f"{name_of(one)}-by-{place}" for one, place in OPERANDS])
def test_each_broken_rule_is_seen_and_the_right_one_passes(monkeypatch, one, place):
    verdict = verdict_on(one, place)
    assert verdict.forward_error < RIGHT
    assert verdict.gradient_error < RIGHT
    rule = differentiate.RULES[one.op]
    for factor in (1.5, -1.0, 0.0):
        monkeypatch.setitem(differentiate.RULES, one.op, partial(scaled, rule, factor))
        assert verdict_on(one, place).gradient_error > 0.1


BEFORE_GATE = "/stem/stem.2/Relu_output_0"
"""Of Excited."""


class File:
    """A file, and the judge's verdict on the gradients of its layers."""

    def __init__(self, path):
        self.model = read_file(path)
        self.image = find_image(self.model)
        shape_of_one = self.image.shape(PX, PX)
        free_batch(self.model, self.image.value, shape_of_one)
        self.known = know(self.model, self.image.value, shape_of_one)
        self.scores = find_scores(self.model, self.known).value
        self.layers = find_layers(self.model, self.known, self.image, find_scores(self.model, self.known))
        self.noise = {self.image.value.name: noise_for(self.image.value, (1, *shape_of_one))}

    def value(self, name):
        return next(value for node in self.model.graph for value in node.outputs if value.name == name)

    def verdict(self, layer):
        return self.verdict_by(layer.value)

    def verdict_by(self, value):
        passes = split(self.model, self.known, self.image.value, [self.scores], [value])
        forward, backward = (open_packed(load_runtime(), graph)[0] for graph in (passes.forward, passes.backward))
        names = [one.name for one in forward.get_outputs()]
        values = self.noise | dict(zip(names, forward.run(None, self.noise), strict=True))

        return judge(
            self.model,
            self.known,
            layer=value,
            scores=[self.scores],
            forward=values,
            gradient_at=gradient_by(passes, backward, value.name, values),
        )


@pytest.mark.parametrize("kind", [Residual, Dense, Excited, Grouped, Tokens, Windows])
def test_gradients_of_whole_networks_pass(tmp_path, kind):
    file = File(export(seeded(kind), tmp_path / "model.onnx"))
    for layer in file.layers:
        verdict = file.verdict(layer)
        assert verdict.forward_error < RIGHT
        assert verdict.gradient_error < RIGHT


@pytest.mark.parametrize(
    ("kind", "layer", "operators"),
    [
        # By the gate, a small part of the gradient goes through some of these.
        (
            Excited,
            BEFORE_GATE,
            {"Conv", "Gemm", "GlobalAveragePool", "Mul", "ReduceMax", "Relu", "Sigmoid"},
        ),
        (Grouped, "", {"Gemm", "ReduceMean", "Resize", "Slice"}),
        (
            Tokens,
            "",
            {"Add", "Gather", "Gemm", "LayerNormalization", "MatMul", "Mul", "Relu", "Reshape", "Softmax", "Squeeze"}
            | {"Transpose", "Unsqueeze"},
        ),
    ],
)
def test_every_broken_rule_of_a_network_is_seen(tmp_path, monkeypatch, kind, layer, operators):
    file = File(export(seeded(kind), tmp_path / "model.onnx"))
    by = file.value(layer) if layer else file.layers[0].value
    seen = set()
    for op in {node.op_type for node in file.model.graph}.intersection(differentiate.RULES):
        with monkeypatch.context() as patch:
            patch.setitem(differentiate.RULES, op, partial(scaled, differentiate.RULES[op], 1.5))
            if file.verdict_by(by).gradient_error > 1000 * RIGHT:
                seen.add(op)
    assert seen == operators


class Photos(CalibrationDataReader):
    """Noise to find the ranges of a quantised network by."""

    def __init__(self, name, shape):
        rng = np.random.default_rng(0)
        self._left = [{name: rng.random(shape, np.float32)} for _ in range(4)]

    def get_next(self):
        return self._left.pop() if self._left else None


@pytest.mark.parametrize("kind", [Excited, Tokens])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_of_quantised_networks_all_but_the_rounding_is_judged(tmp_path, monkeypatch, kind, mode):
    path, quantised = export(seeded(kind), tmp_path / "float.onnx"), tmp_path / "model.onnx"
    if mode == "static":
        name = File(path).image.value.name
        quantize_static(path, quantised, Photos(name, (1, 3, PX, PX)), quant_format=QuantFormat.QDQ)
    else:
        quantize_dynamic(path, quantised, weight_type=QuantType.QUInt8)
    file = File(quantised)
    verdict = file.verdict(file.layers[0])
    # Where a number lies between two steps, onnxruntime's float32 may round it to the other one.
    assert verdict.forward_error < 0.02
    assert verdict.gradient_error < 10 * RIGHT
    op = "DequantizeLinear" if mode == "static" else "DynamicQuantizeLinear"
    monkeypatch.setitem(differentiate.RULES, op, partial(scaled, differentiate.RULES[op], 1.5))
    assert file.verdict(file.layers[0]).gradient_error > 0.1


def test_local_response_normalisation(tmp_path, monkeypatch):
    """Which onnx's reference implementation gets wrong."""
    weights = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
        net (float[N, 3, 32, 32] x) => (float[N, 8] y) {
        a = Conv <strides = [4, 4]> (x, w) b = LRN <size = 3, alpha = 0.5, bias = 1.5> (a) c = Mul(b, b)
        d = GlobalAveragePool(c) y = Flatten(d) }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(proto, tmp_path / "model.onnx")
    file = File(tmp_path / "model.onnx")
    convolved = next(node for node in file.model.graph if node.op_type == "Conv").outputs[0]
    verdict = file.verdict_by(convolved)
    assert max(verdict.forward_error, verdict.gradient_error) < RIGHT
    monkeypatch.setitem(differentiate.RULES, "LRN", partial(scaled, differentiate.RULES["LRN"], 1.5))
    assert file.verdict_by(convolved).gradient_error > 0.1


def test_a_forward_pass_that_is_not_onnxruntimes_is_told(tmp_path, monkeypatch):
    file = File(export(seeded(Excited), tmp_path / "model.onnx"))
    monkeypatch.setitem(float64._OPERATORS, "Conv", lambda node, inputs: 1.01 * float64._conv(node, inputs))
    assert file.verdict_by(file.value(BEFORE_GATE)).forward_error > 1e-5
