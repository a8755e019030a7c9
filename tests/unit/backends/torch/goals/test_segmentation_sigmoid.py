"""Segmentation by sigmoid: as the same network written for softmax, class by class, and which pixels are predicted."""

import sys

import numpy as np
import pytest
import torch

import mask_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.goals.segmentation import PixelGoals
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import ClassIds, Pixels, TopK
from heatlens_server.imaging.preprocess import normalise
from mask_models import Sides
from task_models import photos

MASK = np.zeros((96, 128), bool)
MASK[20:50, 30:90] = True


def engine_of(factory, **options):
    source = f"python:{factory.__module__}:{factory.__name__}"
    model = load_model(ModelConfig(name="m", source=source, task="segmentation", **options))
    return TorchEngine(model, device="cpu")


def side_1():
    return Sides(mask_models.three(), 1)


def side_2():
    return Sides(mask_models.three(), 2)


@pytest.fixture(scope="module")
def one():
    engine = engine_of(mask_models.one)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def three():
    engine = engine_of(mask_models.three, activation="sigmoid")
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])


def run(engine, target, method=Method.HI_RES_CAM, **options):
    image, spec = photos(96, 128)[0], MapSpec(method, engine.info.layers[:1], upsample=False, **options)
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    steps = engine.steps(image, target, spec, rows=16)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def assert_same(result, k, other, *, class_id):
    """An explanation is what another network's only one is, whose class has another number."""
    assert result.class_ids[k] == class_id
    np.testing.assert_allclose(result.maps[k], other.maps[0], atol=1e-5)
    np.testing.assert_allclose(result.scales[k], other.scales[0], rtol=1e-5)
    assert result.scales[k] > 0
    mine, their = result.findings[k], other.findings[0]
    assert (mine.logit, mine.probability, mine.area) == pytest.approx((their.logit, their.probability, their.area))
    assert 0 < mine.area < 1


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.HI_RES_CAM, Method.SCORE_CAM])
def test_one_channel_is_class_1_of_two_channels(one, method, score):
    sides = engine_of(mask_models.sides_of_one)
    assert (one.info.class_count, sides.info.class_count) == (1, 2)
    for mask in (None, MASK):
        mine = run(one, Pixels(TopK(1), mask), method, score=score, return_mask=True)
        their = run(sides, Pixels(ClassIds((1,)), mask), method, score=score, return_mask=True)
        assert_same(mine, 0, their, class_id=0)
        assert (mine.mask, their.masks) == (None, None)
        np.testing.assert_array_equal(mine.masks, their.mask[None])
    sides.close()


def test_classes_that_overlap_are_each_as_if_alone(three):
    result = run(three, Pixels(ClassIds((2, 1))), score=Score.PROBABILITY, return_mask=True)
    assert result.masks.shape == (2, 96, 128)
    assert (result.masks.sum(0) == 2).any()
    for k, factory in enumerate((side_2, side_1)):
        sides = engine_of(factory)
        their = run(sides, Pixels(ClassIds((1,))), score=Score.PROBABILITY, return_mask=True)
        assert_same(result, k, their, class_id=2 - k)
        np.testing.assert_array_equal(result.masks[k], their.mask)
        sides.close()


def test_largest_classes_first_and_masks_only_if_asked_for(three):
    result = run(three, Pixels(TopK(3)))
    assert (result.mask, result.masks) == (None, None)
    areas = [finding.area for finding in result.findings]
    assert areas == sorted(areas, reverse=True)
    assert sum(areas) > 1


def test_measures_take_the_mean_sigmoid_over_the_same_pixels(one):
    result = run(one, Pixels(TopK(1)), metrics=(Metric.DELETION, Metric.AVERAGE_DROP))
    sides = engine_of(mask_models.sides_of_one)
    assert result.faithfulness[0] == pytest.approx(
        run(sides, Pixels(ClassIds((1,))), metrics=(Metric.DELETION, Metric.AVERAGE_DROP)).faithfulness[0], abs=1e-5
    )
    sides.close()


def test_threshold(one):
    engine = engine_of(mask_models.one, threshold=0.6)
    result = run(engine, Pixels(TopK(1)), return_mask=True)
    inputs = torch.from_numpy(normalise(photos(96, 128)[0], IMAGENET_PREPROCESS))[None]
    expected = torch.sigmoid(mask_models.one()(inputs)[0, 0].double()) > 0.6
    assert 0 < expected.sum() < run(one, Pixels(TopK(1)), return_mask=True).masks.sum()
    np.testing.assert_array_equal(result.masks[0], expected.numpy())
    engine.close()


@pytest.mark.parametrize(
    ("same", "changed", "options"),
    [
        ("three", "three_sigmoid", {"activation": "sigmoid"}),
        ("three", "three_hidden_sigmoid", {"activation": "sigmoid", "outputs": "probabilities"}),
        ("three", "three_softmax", {"activation": "softmax"}),
        ("three", "three_log_softmax", {"activation": "softmax"}),
        ("three", "three_in_object", {"activation": "sigmoid"}),
        ("three", "three_in_tuple", {"activation": "sigmoid", "output": 0}),
        ("one", "one_squeezed", {}),
    ],
)
def test_what_a_network_returns_is_read_as_logits(same, changed, options):
    plain = {key: value for key, value in options.items() if key not in {"outputs", "output"}}
    classes = Pixels(ClassIds((0,) if same == "one" else (2, 0)))
    results = []
    for engine in (
        engine_of(getattr(mask_models, same), **plain),
        engine_of(getattr(mask_models, changed), **options),
    ):
        results.append(run(engine, classes, score=Score.PROBABILITY, metrics=(Metric.DELETION,), return_mask=True))
        engine.close()
    expected, found = results
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-3)
    for one, other in zip(found.findings, expected.findings, strict=True):
        assert (one.probability, one.area) == pytest.approx((other.probability, other.area), abs=1e-5)
    for one, other in zip(found.faithfulness, expected.faithfulness, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    np.testing.assert_array_equal(*[one.mask if one.masks is None else one.masks for one in results])


class TestGoals:
    """An image of three pixels by one."""

    LOGITS = torch.tensor([[[[1e-9, 3.0, -1.0]], [[2.0, 0.0, -0.5]], [[-9.0, -1.0, -0.1]]]])

    def goals(self, target, **options):
        return PixelGoals(self.LOGITS, [target], score=Score.PROBABILITY, threshold=0.5, **options)

    def test_pixels_above_the_threshold(self):
        goals = self.goals(Pixels(ClassIds((0, 1, 2))))
        assert goals.by_name(0).mask.tolist() == [[[True, True, False]], [[True, False, False]], [[False] * 3]]
        expected = torch.sigmoid(torch.tensor([[1e-9, 3.0], [2.0, -torch.inf]])).sum(1)
        assert [float(goals.score(k)) for k in range(2)] == pytest.approx(expected.tolist())
        assert float(goals.score(2)) == 0
        result = goals.result(0, *np.zeros((3, 3)))
        assert result.masks.tolist() == [[[1, 1, 0]], [[1, 0, 0]], [[0, 0, 0]]]
        assert [finding.area for finding in result.findings] == pytest.approx([2 / 3, 1 / 3, 0])
        assert result.findings[0].probability == pytest.approx(float(expected[0]) / 2)

    def test_what_is_predicted_nowhere_is_not_among_the_largest(self):
        assert self.goals(Pixels(TopK(3))).class_ids.tolist() == [[0, 1]]

    def test_if_nothing_is_predicted_the_class_that_comes_closest(self):
        nothing = np.array([[False, False, True]])
        goals = self.goals(Pixels(TopK(3), nothing))
        assert goals.class_ids.tolist() == [[2]]
        assert goals.result(0, *np.zeros((3, 1))).findings[0].logit == pytest.approx(-0.1)
        alone = PixelGoals(self.LOGITS[:, 2:], [Pixels(TopK(1))], score=Score.LOGIT, threshold=0.5)
        assert alone.class_ids.tolist() == [[0]]
        assert alone.result(0, *np.zeros((3, 1))).findings[0].area == 0
