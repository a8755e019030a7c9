"""Which engine a model gets, and why: real exports of tiny models, in the session's cache where they can be shared."""

import json
import logging
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import MANIFEST_FILE, Format
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.core.tasks import Task
from heatlens_server.fleet import build as building
from heatlens_server.fleet.build import BuiltModel, build
from heatlens_server.fleet.cache_key import export_key
from heatlens_server.fleet.export import load_network, make_export
from heatlens_server.fleet.fleet import batch_size_of
from heatlens_server.fleet.warm_up import check_answers
from loaded_models import noise

PREPROCESS = {
    "resize_px": 64,
    "crop_px": 64,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def config(factory: str = "tiny_models:tiny", **changes) -> ModelConfig:
    # As in conftest.SERVER_TOML, whose export is the same.
    given = {"name": "m", "source": f"python:{factory}", "layers": ["body", "stem"], "preprocess": PREPROCESS}
    return ModelConfig(**{**given, **changes})


@pytest.fixture
def cache_dir(cache_home):
    """The session's cache."""
    return cache_home / "heatlens"


@pytest.fixture
def make(caplog):
    """Build and close in the end, exporting in this process; (model, reported phases)."""
    caplog.set_level(logging.WARNING)
    made: list[BuiltModel] = []

    def make(config, cache_dir):
        phases: list[str] = []
        made.append(build(config, cache_dir=cache_dir, report=phases.append, make=make_export))
        return made[-1], phases

    yield make
    for model in made:
        model.engine.close()


@pytest.fixture
def cached_export(make, cache_dir):
    """The folder of the session's export of `config()`."""
    make(config(), cache_dir)
    return cache_dir / export_key(config(), Format.ONNX, load_network(config()))


def maps(model: BuiltModel, layer: str = "body") -> np.ndarray:
    results = model.engine.explain(noise(2), [ClassIds((3, 7))] * 2, MapSpec(Method.GRAD_CAM, (layer,), upsample=False))
    return np.stack([result.maps for result in results])


def fails_if_called(*_args, **_kwargs):
    pytest.fail("an export was made")


def test_auto_is_onnxruntime_and_exports_once(make, cache_dir, caplog):
    first, _ = make(config(), cache_dir)
    second, phases = make(config(name="other"), cache_dir)
    torch_model, _ = make(config(engine="torch"), cache_dir)
    assert [first.engine.info.engine_name, second.engine.info.engine_name] == ["onnxruntime"] * 2
    assert phases == []
    assert (second.export_was_cached, torch_model.export_was_cached) == (True, None)
    assert caplog.text == ""
    assert torch_model.engine.info.engine_name == "torch"
    assert (first.version, first.labels, first.preprocess) == (
        torch_model.version,
        torch_model.labels,
        torch_model.preprocess,
    )
    assert second.engine.info.methods == torch_model.engine.info.methods
    assert second.engine.info.layers == torch_model.engine.info.layers == ("body", "stem")
    for layer in ("body", "stem"):
        expected = maps(torch_model, layer)
        assert expected.max() == 1
        np.testing.assert_allclose(maps(second, layer), expected, atol=1e-4)


def test_labels_version_and_method_are_laid_over_a_cached_export(make, cache_dir, tmp_path):
    make(config(), cache_dir)
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij"))
    changed = config(labels=tmp_path / "labels.txt", version="7", method="layer-cam")
    model, phases = make(changed, cache_dir)
    assert (model.labels, model.version, model.method) == (tuple("abcdefghij"), "7", Method.LAYER_CAM)
    assert phases == []
    plain, _ = make(config(), cache_dir)
    assert (plain.labels, plain.method) == ((), Method.GRAD_CAM)
    assert plain.version != "7"


def test_torchscript_if_asked_for(make, cache_dir):
    model, phases = make(config(engine="torchscript"), cache_dir)
    assert model.engine.info.engine_name == "torchscript"
    assert any("exporting for torchscript" in phase for phase in phases)
    reference, _ = make(config(engine="torch"), cache_dir)
    np.testing.assert_allclose(maps(model), maps(reference), atol=1e-4)


def test_what_cannot_be_exported_is_run_by_torch_and_the_log_says_why(make, tmp_path, caplog):
    """Control flow that depends on the pixels."""
    poisonous = config("tiny_models:poisonous")
    model, phases = make(poisonous, tmp_path)
    assert model.engine.info.engine_name == "torch"
    assert "model m is run by torch, not by onnxruntime: the network cannot be recorded" in caplog.text
    assert maps(model).max() == 1
    assert any("recording" in phase for phase in phases)
    # Remembered: no second try, and the same reason.
    caplog.clear()
    again, phases = make(poisonous, tmp_path)
    assert (again.engine.info.engine_name, phases) == ("torch", [])
    assert "the network cannot be recorded" in caplog.text
    assert "found at an earlier start" in caplog.text
    with pytest.raises(ModelLoadError, match="cannot be exported for onnxruntime: the network cannot be recorded"):
        make(poisonous.model_copy(update={"engine": "onnxruntime"}), tmp_path)


def test_an_export_that_is_wrong_is_not_used(make, cached_export, tmp_path, monkeypatch, caplog):
    def exported(*_args, folder, **_kwargs):
        shutil.copytree(cached_export, folder, dirs_exist_ok=True)
        return read_manifest(folder)

    def wrong(*_args, **_kwargs):
        raise ExportError("cam differs by 0.5")

    monkeypatch.setattr("heatlens_server.backends.torch.export.network.export_network", exported)
    monkeypatch.setattr("heatlens_server.backends.torch.export.verify.verify", wrong)
    model, _ = make(config(), tmp_path)
    assert model.engine.info.engine_name == "torch"
    assert "not by onnxruntime: cam differs by 0.5" in caplog.text
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".failed", ".lock"]


@pytest.mark.parametrize("error", [TypeError("bug"), OSError(28, "No space left on device"), MemoryError()])
def test_a_passing_failure_is_not_remembered(make, tmp_path, monkeypatch, caplog, error):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("heatlens_server.backends.torch.export.network.export_network", fail)
    model, _ = make(config(), tmp_path)
    assert model.engine.info.engine_name == "torch"
    assert "not by onnxruntime" in caplog.text
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_changed_forward_with_the_same_weights_is_noticed(make, cached_export, tmp_path, monkeypatch, caplog):
    shutil.copytree(cached_export, tmp_path / cached_export.name)
    before, phases = make(config(), tmp_path)
    assert phases == []
    forward = tiny_models.Tiny.forward
    monkeypatch.setattr(tiny_models.Tiny, "forward", lambda self, x: forward(self, x * 0.5) * 3)
    after, phases = make(config(), tmp_path)
    assert "is not of the model m as it is now" in caplog.text
    assert any("recording" in phase for phase in phases)
    assert after.engine.info.engine_name == "onnxruntime"
    reference, _ = make(config(engine="torch"), tmp_path)
    np.testing.assert_allclose(maps(after), maps(reference), atol=1e-4)
    assert np.abs(maps(after) - maps(before)).max() > 1e-3


HELPED = """
import helped_gate
from tiny_models import Tiny, tiny

class Helped(Tiny):
    def forward(self, x):
        return self.head(helped_gate.gate(self.body(self.stem(x))).mean((-2, -1)))

def make():
    network = Helped()
    network.load_state_dict(tiny().state_dict())
    return network
"""


def test_a_changed_gradient_with_the_same_scores_is_noticed(make, tmp_path, monkeypatch, caplog):
    """By code in a file that defines no module of the network."""
    helper = types.ModuleType("helped_gate")
    helper.gate = lambda features: features * features.sigmoid()
    monkeypatch.setitem(sys.modules, "helped_gate", helper)
    (tmp_path / "helped.py").write_text(HELPED)
    monkeypatch.syspath_prepend(tmp_path)
    small = config("helped:make", layers=["body"])
    make(small, tmp_path / "cache")
    assert make(small, tmp_path / "cache")[1] == []
    helper.gate = lambda features: features * features.sigmoid().detach()
    after, phases = make(small, tmp_path / "cache")
    assert "is not of the model m as it is now" in caplog.text
    assert any("recording" in phase for phase in phases)
    # A graph of the forward pass does not tell what the network's author leaves out of the gradient.
    assert after.engine.info.engine_name == "torch"
    assert "not by onnxruntime: forward.onnx, layer body: cam" in caplog.text
    reference, _ = make(small.model_copy(update={"engine": "torch"}), tmp_path)
    np.testing.assert_allclose(maps(after), maps(reference), atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": "tiny_models:tiny_mlp", "method": "cam"}, "method cam is not supported"),
        ({"factory": "tiny_models:not_finite"}, "not finite"),
        ({"layers": ["boddy"]}, "boddy"),
        ({"factory": "tiny_models:broken"}, "failed"),
    ],
)
def test_what_torch_cannot_explain_is_not_exported(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("heatlens_server.backends.torch.export.network.export_network", fails_if_called)
    with pytest.raises(ModelLoadError, match=message):
        build(config(**changes), cache_dir=tmp_path, make=make_export)


class TinyUnderNoGrad(tiny_models.Tiny):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


@pytest.fixture
def without_gradients(monkeypatch):
    """Of a network without gradients, by the engine "auto"."""
    monkeypatch.setitem(sys.modules, "zoo", types.ModuleType("zoo"))
    sys.modules["zoo"].make = TinyUnderNoGrad
    return config("zoo:make")


def test_a_network_without_gradients_is_run_by_torch_with_a_method_that_needs_none(
    make, tmp_path, caplog, without_gradients
):
    built, _ = make(without_gradients, tmp_path)
    why = "the network computes no gradient behind layer 'body': it runs under torch.no_grad"
    assert (built.engine.info.engine_name, built.method) == ("torch", Method.CAM)
    (said,) = [line for line in built.assumptions if "The default method is cam in place of grad-cam" in line]
    assert why in said
    assert f"is run by torch, not by onnxruntime: exports hold gradients, and {why}" in caplog.text


class TinyOverTheBatch(tiny_models.Tiny):
    def forward(self, x):
        features = self.body(self.stem(x)).mean((-2, -1))
        return self.head(features + features.mean(0))


def test_a_network_that_mixes_the_batch_is_run_by_torch_one_image_at_a_time(make, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "zoo", types.ModuleType("zoo"))
    sys.modules["zoo"].make = TinyOverTheBatch
    mixing = config("zoo:make")
    built, _ = make(mixing, tmp_path)
    assert built.engine.info.engine_name == "torch"
    assert batch_size_of(mixing, built.engine.info) == 1
    assert batch_size_of(mixing, replace(built.engine.info, runs_one_by_one=False)) == 16
    (said,) = [line for line in built.assumptions if "mixes the images of a batch" in line]
    assert said not in caplog.text
    build(mixing, cache_dir=tmp_path).engine.close()
    assert f"model m: {said}" in caplog.text


def test_a_method_that_needs_gradients_where_there_are_none_is_refused_with_the_reason(tmp_path, without_gradients):
    wanted = without_gradients.model_copy(update={"method": Method.LAYER_CAM})
    wanted = ModelConfig(**wanted.model_dump(exclude_unset=True))
    with pytest.raises(ModelLoadError, match="method layer-cam is not supported: the network computes no gradient"):
        build(wanted, cache_dir=tmp_path, make=make_export)


def test_labels_that_do_not_fit_are_told_before_an_export(tmp_path, monkeypatch):
    monkeypatch.setattr("heatlens_server.backends.torch.export.network.export_network", fails_if_called)
    (tmp_path / "labels.txt").write_text("a\nb")
    with pytest.raises(ModelLoadError, match="has 2 names"):
        build(config(labels=tmp_path / "labels.txt"), cache_dir=tmp_path, make=make_export)


def test_without_onnxruntime_auto_is_torch_and_says_how_to_install_it(make, tmp_path, monkeypatch, caplog):
    def missing():
        raise ModelLoadError("onnxruntime is not installed: pip install 'heatlens[server]'")

    monkeypatch.setattr(building, "load_runtime", missing)
    model, phases = make(config(), tmp_path)
    assert (model.engine.info.engine_name, phases) == ("torch", [])
    assert "not by onnxruntime: onnxruntime is not installed: pip install" in caplog.text


@pytest.mark.parametrize(("precision", "reason"), [("bf16", "bf16"), ("fp16", "fp16 makes it slower on a CPU")])
def test_auto_leaves_half_precision_on_a_cpu_to_torch(precision, reason):
    with pytest.raises(building._Unfit, match=reason):
        building._device_for_onnxruntime(config(precision=precision, device="cpu"))


class _Runtime:
    def __init__(self, *providers: str) -> None:
        self.get_available_providers = lambda: list(providers)


@pytest.mark.parametrize(
    ("device", "providers", "torch_has_gpu", "expected"),
    [
        ("auto", ["CUDAExecutionProvider"], True, "cuda:0"),
        ("cuda:1", ["CUDAExecutionProvider"], True, "cuda:1"),
        ("cpu", ["CUDAExecutionProvider"], True, "cpu"),
        ("auto", ["CPUExecutionProvider"], True, None),
        ("cuda", ["CPUExecutionProvider"], True, None),
        # Neither of them can use the GPU.
        ("auto", ["CPUExecutionProvider"], False, "cpu"),
    ],
)
def test_where_auto_runs_on_a_machine_with_a_gpu(monkeypatch, device, providers, torch_has_gpu, expected):
    monkeypatch.setattr(building, "load_runtime", lambda: _Runtime(*providers))
    monkeypatch.setattr(building, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(building, "_torch_has_gpu", lambda: torch_has_gpu)
    if expected is None:
        with pytest.raises(building._Unfit, match="install onnxruntime-gpu"):
            building._device_for_onnxruntime(config(device=device))
    else:
        assert building._device_for_onnxruntime(config(device=device)) == expected


@pytest.fixture
def export(cached_export, tmp_path):
    """A folder with an export, away from the cache."""
    return shutil.copytree(cached_export, tmp_path / "export")


def from_folder(folder, **changes):
    return ModelConfig(**{"name": "e", "source": f"export:{folder}", **changes})


@pytest.mark.parametrize(
    ("written", "configured", "expected", "is_logged"),
    [
        ("multi-label-classification", "auto", Task.MULTI_LABEL, False),
        ("classification", "classification", Task.CLASSIFICATION, False),
        (None, "auto", Task.CLASSIFICATION, True),
        (None, "multi-label-classification", Task.MULTI_LABEL, False),
    ],
)
def test_the_task_of_an_export(make, export, caplog, written, configured, expected, is_logged):
    write_task(export, written)
    model, _ = make(from_folder(export, task=configured), None)
    assert model.engine.info.task is expected
    assert ("model e: the export does not say its task: taken as classification" in caplog.text) is is_logged


def test_a_configured_task_that_is_not_the_exports_is_refused(make, export):
    write_task(export, "classification")
    with pytest.raises(ModelLoadError, match="for classification, not multi-label-classification"):
        make(from_folder(export, task="multi-label-classification"), None)


def write_task(folder, task: str | None) -> None:
    content = json.loads((folder / MANIFEST_FILE).read_text())
    assert content.pop("task") == "classification"
    (folder / MANIFEST_FILE).write_text(json.dumps(content if task is None else {**content, "task": task}))


def test_an_export_is_served_without_the_models_code(make, export, cache_dir, monkeypatch):
    monkeypatch.setattr(building, "load_network", fails_if_called)
    model, _ = make(from_folder(export), None)
    assert model.engine.info.engine_name == "onnxruntime"
    assert model.engine.info.layers == ("body", "stem")
    assert model.method is Method.GRAD_CAM or model.method in model.engine.info.methods
    monkeypatch.undo()
    reference, _ = make(config(engine="torch"), cache_dir)
    assert model.version == reference.version
    np.testing.assert_allclose(maps(model), maps(reference), atol=1e-4)


def test_an_exports_layers_can_be_chosen_and_ordered(make, export):
    model, _ = make(from_folder(export, layers=["stem", "body"], method="layer-cam", version="3"), None)
    assert model.engine.info.layers == ("stem", "body")
    assert (model.method, model.version) == (Method.LAYER_CAM, "3")
    model, _ = make(from_folder(export, layers=["stem"], method="hi-res-cam"), None)
    assert model.engine.info.layers == ("stem",)


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["head"]}, "the export has no layer 'head', only body, stem"),
        ({"layers": ["stem"], "method": "cam"}, "method cam is not supported"),
        ({"precision": "fp16"}, "the export runs in fp32, not fp16"),
        ({"engine": "torchscript"}, "engine 'torchscript' does not run onnx exports: set 'onnxruntime'"),
    ],
)
def test_what_an_export_cannot_do_is_named(export, changes, message):
    with pytest.raises(ModelLoadError, match=message):
        build(from_folder(export, **changes), cache_dir=None)


def test_a_pt2_export_is_refused(export):
    edit(export, format="pt2")
    with pytest.raises(ModelLoadError, match="no engine serves pt2 exports: export the model as onnx or torchscript"):
        build(from_folder(export), cache_dir=None)


def test_a_damaged_export_is_refused_without_a_path(export, tmp_path):
    (export / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelLoadError, match=r"weights\.bin is not the file that was exported") as caught:
        build(from_folder(export), cache_dir=None)
    assert str(tmp_path) not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_count": 7}, r"logits is of shape \(.*, 10\), which class_count 7 does not fit"),
        ({"class_count": "10"}, "class_count: "),
        ({"labels": ["a"]}, "labels: there are 1, for 10 classes"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(export, changes, message):
    edit(export, **changes)
    with pytest.raises(ModelLoadError, match=message):
        build(from_folder(export), cache_dir=None)


def test_an_export_whose_answers_are_of_another_shape_is_refused(make, export):
    model, _ = make(from_folder(export), None)
    info = replace(model.engine.info, class_count=11)
    monkeyed = types.SimpleNamespace(info=info, explain=model.engine.explain)
    with pytest.raises(ModelLoadError, match=r"scores of shape \(10,\), and class_count is 11"):
        check_answers(monkeyed, Method.GRAD_CAM)
