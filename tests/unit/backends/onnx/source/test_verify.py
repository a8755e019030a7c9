"""A gradient that is not the derivative of the forward pass is found when a file is loaded, and not offered."""

import functools

import pytest

import tiny_models
from heatlens_server.backends.onnx.gradient import differentiate
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.export import export_file, parity_of
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.backends.onnx.source.verify import judge_layer, verified
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import GraphSpec
from heatlens_server.core.methods import CLOSED_FORMS, Method
from onnx_files import write_onnx


@pytest.fixture
def loaded(tmp_path):
    path = write_onnx(tiny_models.tiny_mlp(), tmp_path / "m.onnx")
    return load_file(path, ModelConfig(name="m", source=f"onnx:{path}"))


def break_relu(monkeypatch):
    rule = differentiate.RULES["Relu"]

    def broken(node, gradients, tape):
        return [value and tape.op("Neg", value) for value in rule(node, gradients, tape)]

    monkeypatch.setattr(differentiate, "RULES", {**differentiate.RULES, "Relu": broken})


def test_the_gradient_of_every_layer_is_right(loaded):
    for layer in loaded.info.layers:
        verdict = judge_layer(loaded, layer.name)
        assert verdict.forward_error < 1e-5
        assert verdict.gradient_error < 1e-4
    assert verified(loaded) is loaded


def test_a_broken_rule_leaves_the_methods_that_need_no_gradient(loaded, monkeypatch):
    break_relu(monkeypatch)
    found = verified(loaded)
    assert "off from differences in float64" in found.info.refusals[Method.GRAD_CAM]
    engine = NetworkEngine(found, device="cpu", threads=1)
    offered = set(engine.info.methods) & set(CLOSED_FORMS)
    assert offered == {m for m in CLOSED_FORMS if not m.traits.needs_gradient and m is not Method.CAM}


def test_a_broken_rule_is_not_exported(loaded, monkeypatch, tmp_path):
    spec = GraphSpec(loaded.info.layers[0].name)
    judge = functools.partial(parity_of, loaded, spec, lambda _line: None)
    options = {"name": "m", "source": "onnx:m.onnx", "report": lambda _line: None, "judge": judge}
    manifest = export_file(loaded, spec, folder=tmp_path / "right", **options)
    assert manifest.parity["figures"]["gradients"]["error"] < 1e-4
    break_relu(monkeypatch)
    with pytest.raises(ExportError, match="off from differences in float64"):
        export_file(loaded, spec, folder=tmp_path / "wrong", **options)
    assert not (tmp_path / "wrong").exists()
