"""What every engine that takes steps must do; the engines of files must say what the torch engine says."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny_models
from bypassing_networks import BYPASSING, WithoutRule
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds, Similarity, Target, TopK, Values
from heatlens_server.core.tasks import Task
from heatlens_server.maps.steps.drive import STEPPERS
from loaded_models import loaded, noise
from onnx_files import engine_of_file

ENGINES: dict[str, Callable[[LoadedModel], SteppingEngine]] = {
    "torch": lambda model: TorchEngine(model, device="cpu"),
    "onnx file": engine_of_file,
}

TOLERANCE = 1e-4
"""Largest difference of two engines' float32 maps in [0, 1]."""

METHODS = list(STEPPERS)
TWO = ClassIds((3, 7))
(IMAGE,) = noise(1)
BODY = MapSpec(Method.GRAD_CAM, ("body",), upsample=True)


def changed(**changes: object) -> MapSpec:
    return dataclasses.replace(BODY, **changes)


def explained(
    engine: SteppingEngine, spec: MapSpec, target: Target = TWO, image: np.ndarray = IMAGE, rows: int = 16
) -> ImageResult:
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    return run(engine.steps(image, target, spec, rows=rows))[0]


def run(steps) -> tuple[ImageResult, int]:
    """What steps come to, and how many they are."""
    count = 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


@pytest.fixture(scope="module")
def engines():
    made = {name: make(loaded(tiny_models.tiny_mlp(), ("body", "stem"))) for name, make in ENGINES.items()}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(params=ENGINES)
def engine(request, engines):
    return engines[request.param]


def pair(module: nn.Module, grid: Grid | None = None, **changes: object) -> tuple[SteppingEngine, SteppingEngine]:
    """The two engines of a network whose layer is `body`."""
    grids = {"body": grid} if grid else {}
    torch_engine, other = (
        make(dataclasses.replace(loaded(module), grids=grids, **changes)) for make in ENGINES.values()
    )
    return torch_engine, other


def assert_alike(found: ImageResult, expected: ImageResult, tolerance: float = TOLERANCE) -> None:
    assert found.class_ids == expected.class_ids
    assert expected.maps.max() == 1.0, "a flat map would prove nothing"
    np.testing.assert_allclose(found.maps, expected.maps, atol=tolerance)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY, Score.CONTRAST])
def test_methods_of_many_runs_agree(engines, method, score):
    spec = changed(method=method, score=score)
    (expected, steps), (found, same) = (
        run(engine.steps(IMAGE, TWO, spec, rows=16)) for engine in (engines["torch"], engines["onnx file"])
    )
    assert_alike(found, expected)
    assert same == steps


@pytest.mark.parametrize(
    "spec",
    [
        changed(augment=True),
        changed(method=Method.EIGEN_CAM, augment=True, upsample=False),
        changed(method=Method.RECIPRO_CAM, augment=True),
        changed(method=Method.ABLATION_CAM, layers=("stem", "body"), aggregation=Aggregation.PRODUCT),
        changed(method=Method.SMOOTH_GRAD_CAM_PLUS_PLUS, layers=("body", "stem"), aggregation=Aggregation.MAX),
        changed(method=Method.LAYER_CAM, principal=True, layers=("body", "stem")),
        changed(principal=True, augment=True, score=Score.LOG_PROBABILITY),
    ],
    ids=str,
)
def test_options_agree(engines, spec):
    assert_alike(explained(engines["onnx file"], spec), explained(engines["torch"], spec))


@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.RECIPRO_CAM])
def test_measures_agree(engines, method):
    metrics = tuple(metric for metric in Metric if metric is not Metric.MODEL_RANDOMISATION)
    spec = changed(method=method, metrics=metrics)
    found, expected = (explained(engines[name], spec) for name in ("onnx file", "torch"))
    assert len(found.faithfulness) == 2
    for mine, theirs in zip(found.faithfulness, expected.faithfulness, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
        assert list(mine) == list(metrics)


def test_a_model_of_random_weights_has_other_maps(engine):
    spec = changed(method=Method.LAYER_CAM, metrics=(Metric.MODEL_RANDOMISATION,))
    once, again = (explained(engine, spec).faithfulness for _ in range(2))
    assert once == again
    assert all(-1 <= of_goal[Metric.MODEL_RANDOMISATION] < 0.9 for of_goal in once)


@pytest.mark.parametrize("method", METHODS)
def test_maps_do_not_depend_on_the_rows_of_a_step(engine, method):
    whole = explained(engine, changed(method=method))
    parts = explained(engine, changed(method=method), rows=3)
    assert_alike(parts, whole)


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_two_images_may_be_interleaved_with_anything(engine, method):
    spec = changed(method=method)
    images = noise(2, seed=4)
    expected = [explained(engine, spec, TopK(1), image) for image in images]
    running = {n: engine.steps(image, TopK(1), spec, rows=16) for n, image in enumerate(images)}
    results = {}
    with torch.inference_mode():
        while running:
            for n, steps in list(running.items()):
                try:
                    next(steps)
                except StopIteration as stop:
                    results[n] = stop.value
                    del running[n]
            engine.explain(images, [TopK(2)] * 2, changed(upsample=False))
    for n, result in enumerate(expected):
        np.testing.assert_array_equal(results[n].maps, result.maps)
        assert results[n].class_ids == result.class_ids


def test_what_was_given_up_leaves_nothing_behind(engine):
    expected = explained(engine, changed(method=Method.ABLATION_CAM))
    steps = engine.steps(IMAGE, TopK(1), changed(method=Method.SCORE_CAM), rows=2)
    next(steps)
    steps.close()
    np.testing.assert_array_equal(explained(engine, changed(method=Method.ABLATION_CAM)).maps, expected.maps)


@pytest.mark.parametrize("method", [Method.ABLATION_CAM, Method.RECIPRO_CAM])
@pytest.mark.parametrize("kind", BYPASSING)
def test_what_bypasses_a_layer_stays(kind, method):
    torch_engine, engine = pair(kind())
    assert (Method.GRAD_CAM in engine.info.methods) == (kind is not WithoutRule)
    for image in noise(2, seed=1):
        spec = changed(method=method, upsample=False)
        found, expected = (explained(one, spec, TopK(2), image, rows=5) for one in (engine, torch_engine))
        assert_alike(found, expected)


class Shaped(nn.Module):
    """A network whose layer `body` returns a form of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 8, 16, stride=16)
        self.body = nn.Identity()
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pooled(self.body(self.shaped(self.stem(x).tanh()))))


class Transformer(Shaped):
    """A class token that attends to the others."""

    def shaped(self, features: Tensor) -> Tensor:
        tokens = features.flatten(2).transpose(1, 2)
        return torch.cat([tokens.mean(1, keepdim=True) + 1, tokens], dim=1) * 1.5

    def pooled(self, tokens: Tensor) -> Tensor:
        return ((self.mix(tokens) @ tokens.transpose(1, 2)).softmax(-1) @ tokens)[:, 0]


class ChannelsLast(Shaped):
    """Windowed transformers' layout."""

    def shaped(self, features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1) * 1.5

    def pooled(self, features: Tensor) -> Tensor:
        return F.relu(self.mix(features)).mean((1, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "grid"),
    [(Transformer, Grid(Layout.TOKENS, prefix=1, height=4, width=4)), (ChannelsLast, Grid(Layout.CHANNELS_LAST))],
)
def test_every_layout_has_every_method(kind, grid, method):
    torch_engine, engine = pair(kind(), grid)
    found, expected = (explained(one, changed(method=method)) for one in (engine, torch_engine))
    assert_alike(found, expected)


@pytest.mark.parametrize(
    ("task", "target"),
    [
        (Task.REGRESSION, Values((2, 5))),
        (Task.EMBEDDING, Similarity(noise(1, seed=9)[0])),
        (Task.MULTI_LABEL, ClassIds((1, 4))),
    ],
)
def test_every_task_has_steps(task, target):
    torch_engine, engine = pair(tiny_models.tiny_mlp(), task=task)
    metrics = tuple(sorted(task.traits.default_metrics))
    for method in (Method.SCORE_CAM, Method.ABLATION_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS):
        spec = changed(method=method, metrics=metrics, upsample=False)
        found, expected = (explained(one, spec, target) for one in (engine, torch_engine))
        assert_alike(found, expected)
        for mine, theirs in zip(found.faithfulness, expected.faithfulness, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)


def test_images_run_alone_where_the_network_mixes_them():
    class Mixing(tiny_models.TinyMlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0, keepdim=True) * 0.5)

    torch.manual_seed(0)
    torch_engine, engine = pair(Mixing())
    assert engine.info.runs_one_by_one
    for method in (Method.RECIPRO_CAM, Method.SCORE_CAM):
        found, expected = (explained(one, changed(method=method)) for one in (engine, torch_engine))
        assert_alike(found, expected)
