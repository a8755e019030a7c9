"""Torch beside an export: what is offered before it is loaded, what it then gives, and when it is not to be."""

import dataclasses

import numpy as np
import pytest

import tiny_models
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Aggregation, Method, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds
from heatlens_server.core.tasks import Task
from heatlens_server.fleet import fallback_engine
from heatlens_server.fleet.build import BuiltModel, build
from heatlens_server.fleet.export import make_export
from loaded_models import noise

PREPROCESS = {
    "resize_px": 64,
    "crop_px": 64,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
TARGET = ClassIds((3, 7))
PLAIN = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
NEEDS_TORCH = dataclasses.replace(PLAIN, method=Method.SHAPLEY_CAM)
OF_TORCH = {Method.SHAPLEY_CAM, Method.FULL_GRAD, Method.GUIDED_GRAD_CAM}
BOTH = dataclasses.replace(PLAIN, layers=("body", "stem"))


def config(**changes) -> ModelConfig:
    # As in conftest.SERVER_TOML, whose export is the same.
    given = {"name": "m", "source": "python:tiny_models:tiny", "layers": ["body", "stem"], "preprocess": PREPROCESS}
    return ModelConfig(**{**given, **changes})


@pytest.fixture
def make(cache_home):
    made: list[BuiltModel] = []

    def make(**changes) -> SteppingEngine:
        made.append(
            build(config(**changes), cache_dir=cache_home / "heatlens", report=lambda line: None, make=make_export)
        )
        return made[-1].engine

    yield make
    for model in made:
        model.engine.close()


def explained(engine: SteppingEngine, image: np.ndarray, spec: MapSpec) -> ImageResult:
    if not spec.in_steps:
        return engine.explain(image[None], [TARGET], spec)[0]
    steps = engine.steps(image, TARGET, spec, rows=4)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_both_together_have_what_torch_has_and_say_so_without_loading_it(make, monkeypatch):
    torch_engine = make(engine="torch")
    monkeypatch.setattr(fallback_engine, "_load", lambda *_args, **_kwargs: pytest.fail("torch was loaded"))
    engine = make()
    assert engine.info.engine_name == "onnxruntime"
    assert engine.info.methods == torch_engine.info.methods
    assert (engine.info.scores, engine.info.has_options) == (torch_engine.info.scores, True)
    assert engine.info.requestable_methods == torch_engine.info.requestable_methods
    assert engine.info.fallback_methods == OF_TORCH
    assert not engine.info.refusals
    assert Method.LE_GRAD not in engine.info.methods  # there is no attention in it
    assert not engine.is_loaded_for(dataclasses.replace(PLAIN, method=Method.SHAPLEY_CAM))


def test_without_torch_its_methods_are_refused_and_the_model_says_so(cache_home, make, monkeypatch):
    monkeypatch.setattr(fallback_engine, "is_installed", lambda package: package != "torch")
    model = build(config(), cache_dir=cache_home / "heatlens", report=lambda line: None, make=make_export)
    info = model.engine.info
    model.engine.close()
    assert not OF_TORCH & set(info.methods)
    assert (info.scores, info.has_options, info.fallback_methods) == (tuple(Score), True, frozenset())
    assert info.why_not(Method.SHAPLEY_CAM) == ": the server has no PyTorch"
    (said,) = (line for line in model.assumptions if "PyTorch" in line)
    assert "shapley-cam" in said
    assert "target scores" not in said  # the export has them, and options
    assert "augment" not in said
    assert "le-grad" not in said  # torch would not have it either: there is no attention
    assert "pip install 'heatlens[torch]'" in said
    with pytest.raises(ModelLoadError, match=r"method shapley-cam is not supported: the server has no PyTorch; this"):
        make(method="shapley-cam", engine="onnxruntime")


def test_who_wants_no_companion_is_not_told_that_torch_is_missing(cache_home, monkeypatch):
    monkeypatch.setattr(fallback_engine, "is_installed", lambda package: package != "torch")
    alone = config(companion=False)
    model = build(alone, cache_dir=cache_home / "heatlens", report=lambda line: None, make=make_export)
    model.engine.close()
    assert not OF_TORCH & set(model.engine.info.methods)
    assert not any("PyTorch" in line for line in model.assumptions)


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(PLAIN, method=Method.SHAPLEY_CAM),
        dataclasses.replace(PLAIN, method=Method.FULL_GRAD),
        dataclasses.replace(PLAIN, method=Method.SHAPLEY_CAM, augment=True),
    ],
)
def test_what_the_export_has_not_is_what_torch_gives(make, spec):
    engine, reference = make(), make(engine="torch")
    assert not engine.primary.can(spec)
    image = noise(1)[0]
    engine.load_for(spec)
    found, expected = explained(engine, image, spec), explained(reference, image, spec)
    assert expected.maps.max() == 1
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
    np.testing.assert_allclose(found.logits, explained(engine, image, PLAIN).logits, atol=1e-4)


@pytest.mark.parametrize(
    "spec",
    [
        *(dataclasses.replace(PLAIN, score=score) for score in Score),
        dataclasses.replace(BOTH, aggregation=Aggregation.PRODUCT),
        dataclasses.replace(BOTH, method=Method.EIGEN_CAM),
        dataclasses.replace(PLAIN, layers=("stem",), method=Method.EIGEN_GRAD_CAM),
        dataclasses.replace(PLAIN, augment=True),
        dataclasses.replace(PLAIN, principal=True),
        dataclasses.replace(PLAIN, layers=("stem",), method=Method.ABLATION_CAM),
        dataclasses.replace(PLAIN, method=Method.SCORE_CAM),
    ],
)
def test_the_export_has_all_else(make, spec):
    engine, reference = make(companion=False), make(engine="torch")
    assert engine.primary.can(spec)
    (image,) = noise(1)
    found, expected = explained(engine, image, spec), explained(reference, image, spec)
    assert expected.maps.max() == 1
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4)


def test_it_can_be_left_out(make):
    engine = make(companion=False)
    assert not OF_TORCH & set(engine.info.methods)
    presets = {Method.FINER_CAM, Method.REFINE_CAM}  # Grad-CAM of the contrast, and by both layers
    assert set(engine.info.requestable_methods) == {*engine.info.methods, *presets}
    assert engine.info.layers_of(Method.CAM) == ("body",)
    assert engine.info.layers_of(Method.EIGEN_CAM) == engine.info.layers_of(Method.GRAD_CAM) == ("body", "stem")
    assert (engine.info.scores, engine.info.has_options) == (tuple(Score), True)
    with pytest.raises(ModelLoadError, match="method shapley-cam is not supported: it differentiates twice"):
        make(companion=False, engine="onnxruntime", method="shapley-cam")
    assert make(companion=False, method="shapley-cam").info.engine_name == "torch"


@pytest.mark.parametrize("method", ["full-grad", "shapley-cam"])
def test_a_default_method_that_needs_it_loads_it_at_the_start(make, method):
    engine = make(method=method)
    assert engine.info.engine_name == "onnxruntime"
    assert engine.is_loaded_for(NEEDS_TORCH)


@pytest.mark.parametrize("method", ["refine-cam", "finer-cam", "recipro-cam"])
def test_a_default_method_of_the_exports_does_not(make, method):
    assert not make(method=method).is_loaded_for(NEEDS_TORCH)


def test_a_multi_label_model_is_one_in_both_engines(make):
    engine = make(task="multi-label-classification")
    assert engine.info.task is Task.MULTI_LABEL
    spec = dataclasses.replace(NEEDS_TORCH, score=Score.PROBABILITY)
    engine.load_for(spec)
    assert engine.is_loaded_for(spec)
    plain = dataclasses.replace(PLAIN, score=Score.PROBABILITY)
    (image,) = noise(1)
    found, expected = (
        explained(engine, image, plain),
        explained(make(engine="torch", task="multi-label-classification"), image, plain),
    )
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4)


def test_other_weights_than_those_that_were_exported_are_not_taken(make, monkeypatch):
    engine = make()
    monkeypatch.setattr(tiny_models, "tiny", tiny_models.tiny_mlp)
    spec = dataclasses.replace(NEEDS_TORCH, score=Score.CONTRAST)
    with pytest.raises(ModelLoadError, match="gives other weights than those that were loaded; reload the model"):
        engine.load_for(spec)
    assert explained(engine, noise(1)[0], PLAIN).maps.max() == 1
    monkeypatch.undo()
    engine.load_for(spec)
    assert engine.is_loaded_for(spec)
