"""What is particular to the TorchScript engine: modules, warnings, modes, exports of either kind."""

import dataclasses
import gc
import shutil
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelFilesChanged, ModelLoadError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import CLOSED_FORMS, Method, Score
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import bundle, loaded, noise, user_export

SPEC = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
TARGETS = [TopK(3), ClassIds((4,)), TopK(1), ClassIds((1, 2, 3, 9, 0)), TopK(10)]


def tiny_bundle():
    return bundle(loaded(tiny_models.tiny()))


def test_it_says_what_it_can_do():
    model = loaded(tiny_models.tiny_mlp(), ("body", "stem"))
    engine = TorchScriptEngine(*bundle(model))
    reference = TorchEngine(model, device="cpu")
    methods = tuple(method for method in CLOSED_FORMS if method is not Method.CAM)
    assert engine.info == dataclasses.replace(
        reference.info,
        engine_name="torchscript",
        methods=methods,
        scores=(Score.LOGIT,),
        has_options=False,
        takes_steps=False,
        layers_by_method=dict.fromkeys((m for m in methods if m.traits.default_layer_only), ("body",)),
        layer_shapes={},
    )
    plain = MapSpec(Method.EIGEN_CAM, ("body",), upsample=False)
    assert engine.can(plain)
    assert engine.can(dataclasses.replace(plain, method=Method.LAYER_CAM, layers=("stem", "body")))
    for beyond in (
        {"layers": ("stem",)},
        {"method": Method.CAM},
        {"method": Method.SCORE_CAM},
        {"method": Method.GRAD_CAM, "score": Score.PROBABILITY},
        {"method": Method.GRAD_CAM, "principal": True},
        {"augment": True},
    ):
        assert not engine.can(dataclasses.replace(plain, **beyond))


@pytest.fixture
def modules(monkeypatch):
    """Every module that is loaded, for as long as somebody holds it."""
    loaded_modules: list[weakref.ref[torch.jit.ScriptModule]] = []
    load = torch.jit.load

    def noting(*args, **kwargs):
        module = load(*args, **kwargs)
        loaded_modules.append(weakref.ref(module))
        return module

    monkeypatch.setattr(torch.jit, "load", noting)
    return loaded_modules


def test_a_layer_whose_file_was_overwritten_is_refused_and_the_others_go_on(tmp_path):
    source, manifest = bundle(loaded(tiny_models.tiny_mlp(), ("body", "stem")))
    folder = Path(shutil.copytree(source, tmp_path / "export"))
    engine = TorchScriptEngine(folder, manifest, device="cpu")
    for file in {graph.file for graph in manifest.graphs}:
        (folder / file).write_bytes(b"another")
    assert len(engine.explain(noise(1), [TopK(1)], SPEC)) == 1
    with pytest.raises(ModelFilesChanged, match="reload the model"):
        engine.explain(noise(1), [TopK(1)], dataclasses.replace(SPEC, layers=("stem",)))
    engine.close()


def test_one_module_per_layer_serves_every_method(modules):
    engine = TorchScriptEngine(*bundle(loaded(tiny_models.tiny_mlp(), ("body", "stem"))))
    assert len(engine.info.methods) == len(CLOSED_FORMS) - 1
    assert len(modules) == 1
    for method in engine.info.methods:
        for layer in ("body", "stem"):
            spec = MapSpec(method, (layer,), upsample=False)
            if engine.can(spec):
                engine.explain(noise(1), [TopK(1)], spec)
    assert len(modules) == 2


@pytest.mark.parametrize(("classes", "kind"), [(1, InputKind.FLOAT), (2, InputKind.UINT8), (None, InputKind.FLOAT)])
def test_exports_made_by_hand_are_served_too(classes, kind):
    model = loaded(tiny_models.tiny_mlp())
    export = user_export(model, Format.TORCHSCRIPT, GraphSpec("body", classes=classes, input=kind))
    engine = TorchScriptEngine(*export, device="cpu")
    reference = TorchEngine(model, device="cpu")
    for upsample in (False, True):
        spec = MapSpec(Method.GRAD_CAM, ("body",), upsample)
        results = zip(engine.explain(noise(5), TARGETS, spec), reference.explain(noise(5), TARGETS, spec), strict=True)
        for result, expected in results:
            assert result.class_ids == expected.class_ids
            np.testing.assert_allclose(result.maps, expected.maps, atol=1e-5)
            np.testing.assert_allclose(result.scales, expected.scales, rtol=1e-4)
            np.testing.assert_allclose(result.logits, expected.logits, atol=1e-5)


def test_an_export_without_gradients_is_served_if_its_method_needs_none():
    model = loaded(tiny_models.tiny_mlp())
    outputs = (Output.LOGITS, Output.CLASS_ID, Output.ACTIVATIONS)
    spec = MapSpec(Method.EIGEN_CAM, ("body",), upsample=False)
    engine = TorchScriptEngine(
        *user_export(model, Format.TORCHSCRIPT, GraphSpec("body", spec.method, None, outputs=outputs)), device="cpu"
    )
    (found,) = engine.explain(noise(1), [TopK(3)], spec)
    (expected,) = TorchEngine(model, device="cpu").explain(noise(1), [TopK(3)], spec)
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
    assert found.maps[2].any()
    export = user_export(model, Format.TORCHSCRIPT, GraphSpec("body", Method.LAYER_CAM, None, outputs=outputs))
    with pytest.raises(ModelLoadError, match="does not return gradients"):
        TorchScriptEngine(*export, device="cpu")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_callers_grad_mode_does_not_matter(mode):
    engine = TorchScriptEngine(*tiny_bundle(), device="cpu")
    (expected,) = engine.explain(noise(1), [TopK(1)], SPEC)
    with mode():
        (result,) = engine.explain(noise(1), [TopK(1)], SPEC)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    np.testing.assert_array_equal(result.maps, expected.maps)


def test_only_the_deprecation_of_torchscript_is_silenced(monkeypatch):
    real = torch.jit.load

    def loud(*args, **kwargs):
        warnings.warn("something else", FutureWarning, stacklevel=1)
        return real(*args, **kwargs)

    folder, manifest = tiny_bundle()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TorchScriptEngine(folder, manifest, device="cpu")
    monkeypatch.setattr(torch.jit, "load", loud)
    with pytest.warns(FutureWarning, match="something else") as caught:
        TorchScriptEngine(folder, manifest, device="cpu")
    assert len(caught) == 1


def test_what_the_export_does_not_have_is_refused():
    engine = TorchScriptEngine(*tiny_bundle(), device="cpu")
    with pytest.raises(ValueError, match="no graph for layer 'stem' and method grad-cam"):
        engine.explain(noise(1), [TopK(1)], MapSpec(Method.GRAD_CAM, ("stem",), upsample=False))


def test_close_lets_go_of_the_modules(modules):
    engine = TorchScriptEngine(*tiny_bundle(), device="cpu")
    engine.close()
    engine.close()
    gc.collect()
    assert [module() for module in modules] == [None]
    with pytest.raises(ValueError, match="no graph"):
        engine.explain(noise(1), [TopK(1)], SPEC)


class Greedy(torch.nn.Module):
    """Wants more memory than there is for class ids, and none for ranks."""

    def forward(self, image, class_index):
        return image, class_index, torch.empty([int(class_index.max()) + 1, 1 << 50]), image


class Broken(torch.nn.Module):
    def forward(self, image, class_index):
        return image @ class_index, class_index, image, image


class Viewer(torch.nn.Module):
    """Views pixels in the order of planes, which channels_last tensors do not have."""

    def forward(self, image, class_index):
        pixels = image.float().view([image.shape[0], -1])
        activations = image[:, :, :8, :8].float()
        return pixels[:, :10], class_index, activations, activations.unsqueeze(1)


def scripted(folder, module):
    """An export whose modules are this one."""
    _, manifest = tiny_bundle()
    for name in manifest.files:
        torch.jit.script(module).save(str(folder / name))
    return folder, manifest


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_an_allocation_that_fails_is_a_memory_error(tmp_path):
    engine = TorchScriptEngine(*scripted(tmp_path, Greedy()), device="cpu")
    with pytest.raises(MemoryError):
        engine.explain(noise(1), [ClassIds((3,))], SPEC)


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_a_module_that_does_not_run_fails_at_load(tmp_path):
    with pytest.raises(ModelLoadError, match="does not run on cpu"):
        TorchScriptEngine(*scripted(tmp_path, Broken()), device="cpu")


@pytest.mark.filterwarnings("ignore:`torch.jit.:FutureWarning")
def test_a_module_that_needs_contiguous_images_gets_them(tmp_path):
    engine = TorchScriptEngine(*scripted(tmp_path, Viewer()), device="cpu")
    images = noise(3)
    results = engine.explain(images, [ClassIds((3,))] * 3, SPEC)
    for image, result in zip(images, results, strict=True):
        np.testing.assert_array_equal(result.logits, image[0, :10, 0])


def test_a_damaged_module_fails_at_load_without_naming_paths(tmp_path):
    _, manifest = tiny_bundle()
    for name in manifest.files:
        (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match="cannot be loaded as TorchScript") as caught:
        TorchScriptEngine(tmp_path, manifest, device="cpu")
    assert str(tmp_path) not in str(caught.value)


def test_exports_that_are_not_for_it_fail_at_load():
    folder, manifest = tiny_bundle()
    with pytest.raises(ModelLoadError, match="the export is onnx, not torchscript"):
        TorchScriptEngine(folder, dataclasses.replace(manifest, format=Format.ONNX))
    poor = dataclasses.replace(manifest.graphs[0], outputs=(Output.LOGITS, Output.CLASS_ID, Output.CAM))
    with pytest.raises(ModelLoadError, match="does not return activations, gradients"):
        TorchScriptEngine(folder, dataclasses.replace(manifest, graphs=(poor,)))


def test_missing_cuda_device_is_said():
    with pytest.raises(ModelLoadError, match="no device 'cuda:99'"):
        TorchScriptEngine(*tiny_bundle(), device="cuda:99")
