"""Segmentation: the grad-cam package's recipe, gradients by hand, and which pixels count."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import SemanticSegmentationTarget
from torch import nn

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.goals.segmentation import PixelGoals, Segmentation
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import ClassIds, Detections, Pixels, TopK
from heatlens_server.imaging.preprocess import normalise
from task_models import PX, by_hand, lraspp, photos, raw, recorded, segmenter


@pytest.fixture(scope="module")
def small():
    """An engine of a network whose scores are a tensor of half the input's size."""
    engine = TorchEngine(segmenter(), device="cpu")
    yield engine
    engine.close()


def run(engine, image, target, spec):
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    steps = engine.steps(image, target, spec, rows=16)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def inputs_of(model, image):
    return torch.from_numpy(normalise(image, model.preprocess))[None]


class _Out(nn.Module):
    """As the tutorial wraps a network of torchvision's."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)["out"]


def test_equals_the_package_on_a_network_of_torchvisions():
    model, image = segmenter(lraspp), photos(PX, 128)[0]
    module = _Out(copy.deepcopy(model.module)).requires_grad_(True)
    engine = TorchEngine(model, device="cpu")
    result = run(engine, image, Pixels(TopK(3)), MapSpec(Method.GRAD_CAM, ("backbone.16",), upsample=True))
    inputs = inputs_of(model, image)
    with torch.no_grad():
        predicted = module(inputs)[0].argmax(0).numpy()
    areas = np.bincount(predicted.ravel(), minlength=7)
    assert result.class_ids == tuple(int(c) for c in np.argsort(-areas, kind="stable")[:3])
    for k, finding in enumerate(result.findings):
        targets = [SemanticSegmentationTarget(finding.class_id, np.float32(predicted == finding.class_id))]
        with GradCAM(module, [module.module.backbone["16"]]) as cam:
            theirs = cam(inputs, targets=targets)[0]
        assert theirs.max() > 0.9
        np.testing.assert_allclose(result.maps[k], theirs, atol=2e-3)
        assert finding.area == pytest.approx(areas[finding.class_id] / predicted.size)
    engine.close()


@pytest.mark.parametrize("score", Score)
def test_scores_and_gradients_by_hand(small, score):
    model, image = segmenter(), photos()[1]
    mask = np.zeros((PX, PX), bool)
    mask[10:60, 20:70] = True
    activations, output = recorded(model.module, "backbone", inputs_of(model, image))
    logits = F.interpolate(output, size=(PX, PX), mode="bilinear")[0]
    result = run(
        small,
        image,
        Pixels(ClassIds((3, 1)), mask),
        MapSpec(Method.HI_RES_CAM, ("backbone",), upsample=False, score=score),
    )
    assert result.class_ids == (3, 1)
    pixels = logits[:, torch.from_numpy(mask)]
    for k, class_id in enumerate((3, 1)):
        if score is Score.LOGIT:
            total = pixels[class_id].sum()
        elif score is Score.CONTRAST:
            total = sum(
                own - (torch.softmax(near, 0) * near).sum()
                for own, near in zip(pixels[class_id], nearest(pixels, class_id), strict=True)
            )
        else:
            of_class = torch.softmax(pixels, 0)[class_id]
            total = (of_class if score is Score.PROBABILITY else of_class.log()).sum()
        (gradient,) = torch.autograd.grad(total, activations, retain_graph=True)
        expected = by_hand(Method.HI_RES_CAM, activations, gradient)
        assert expected.max() > 0
        np.testing.assert_allclose(raw(result, k), expected, rtol=1e-3, atol=2e-4 * expected.max())
        finding = result.findings[k]
        assert finding.logit == pytest.approx(float(pixels[class_id].detach().mean()), rel=1e-4, abs=1e-4)
        assert finding.probability == pytest.approx(float(torch.softmax(pixels.detach(), 0)[class_id].mean()), rel=1e-4)


def nearest(pixels, class_id):
    """For each pixel the logits of the three classes that are closest to one's own."""
    for column in pixels.T:
        others = torch.cat([column[:class_id], column[class_id + 1 :]])
        yield others[(others.detach() - column[class_id].detach()).abs().argsort(stable=True)[:3]]


def test_a_batch_says_what_each_image_says_alone(small):
    images = photos()
    mask = np.zeros((PX, PX), bool)
    mask[:, 50:] = True
    targets = [Pixels(TopK(4)), Pixels(ClassIds((0,)), mask), Pixels(ClassIds((4, 2, 1)))]
    spec = MapSpec(Method.GRAD_CAM, small.info.layers[:2], upsample=True, return_mask=True)
    for image, target, result in zip(images, targets, small.explain(images, targets, spec), strict=True):
        alone = run(small, image, target, spec)
        assert result.class_ids == alone.class_ids
        assert result.findings == pytest.approx(alone.findings) or all(
            one.area == other.area for one, other in zip(result.findings, alone.findings, strict=True)
        )
        np.testing.assert_allclose(result.maps, alone.maps, atol=1e-3)
        np.testing.assert_array_equal(result.mask, alone.mask)


def test_the_predicted_mask_if_it_is_asked_for(small):
    image = photos(70, 90)[0]
    spec = MapSpec(Method.GRAD_CAM, ("backbone",), upsample=False)
    assert run(small, image, Pixels(TopK(1)), spec).mask is None
    spec = MapSpec(Method.GRAD_CAM, ("backbone",), upsample=False, return_mask=True)
    result = run(small, image, Pixels(TopK(5)), spec)
    assert (result.mask.shape, result.mask.dtype) == ((70, 90), np.uint8)
    areas = [finding.area for finding in result.findings]
    assert areas == [pytest.approx((result.mask == class_id).mean()) for class_id in result.class_ids]
    assert areas == sorted(areas, reverse=True)
    assert sum(areas) == pytest.approx(1)
    # Fewer than five: what is nowhere is not among the largest.
    assert len(areas) == len(np.unique(result.mask)) < 5


def test_a_class_that_is_nowhere_has_a_flat_map(small):
    spec = MapSpec(Method.GRAD_CAM, ("backbone",), upsample=False, return_mask=True)
    found = run(small, photos()[0], Pixels(TopK(5)), spec)
    (absent, *_) = set(range(5)) - set(found.class_ids)
    for method in (Method.GRAD_CAM, Method.ABLATION_CAM):
        spec = MapSpec(method, ("backbone",), upsample=False)
        result = run(small, photos()[0], Pixels(ClassIds((absent, found.class_ids[0]))), spec)
        assert result.class_ids == (absent, found.class_ids[0])
        assert not result.maps[0].any()
        assert result.maps[1].any()
        nowhere = result.findings[0]
        assert (nowhere.area, nowhere.logit, nowhere.probability) == (0, 0, 0)


def test_every_method_gives_finite_maps(small):
    assert (small.info.input_height_px, small.info.input_width_px) == (0, 0)
    assert small.info.scores == tuple(Score)
    for method in small.info.methods:
        if method is Method.SS_CAM:  # Score-CAM 35 times over
            continue
        result = run(small, photos()[0], Pixels(TopK(2)), MapSpec(method, small.info.layers[:1], upsample=False))
        assert np.isfinite(result.maps).all(), method
        assert (result.scales > 0).any(), method


def test_sums_that_leave_float16_come_back():
    """A score of 9216 pixels: its gradient at the layer is past 65504 times what float16 scores are scaled by."""
    target, spec = Pixels(ClassIds((0,)), np.ones((PX, PX), bool)), MapSpec(Method.HI_RES_CAM, ("backbone",), False)
    maps = []
    for precision in ("fp32", "fp16"):
        engine = TorchEngine(segmenter(), device="cpu", precision=precision)
        maps.append(raw(run(engine, photos()[0], target, spec), 0))
        engine.close()
    assert maps[0].max() > 0
    np.testing.assert_allclose(maps[1], maps[0], atol=0.02 * maps[0].max())


def test_faithfulness_of_pixels(small):
    metrics = (Metric.DELETION, Metric.INSERTION, Metric.MODEL_RANDOMISATION)
    spec = MapSpec(Method.GRAD_CAM, ("backbone",), upsample=False, metrics=metrics)
    result = run(small, photos()[0], Pixels(TopK(2)), spec)
    assert [set(measures) for measures in result.faithfulness] == [set(metrics)] * 2
    assert all(np.isfinite(list(measures.values())).all() for measures in result.faithfulness)


class TestGoals:
    """Two pixels of class 1, one of class 0, in an image of three by one."""

    LOGITS = torch.tensor([[[[2.0, 0.0, 0.0]], [[0.0, 3.0, 1.0]], [[-9.0, -9.0, -9.0]]]])

    def test_pixels_stay_the_same_in_changed_images(self):
        goals = PixelGoals(self.LOGITS, [Pixels(TopK(2))], score=Score.LOGIT)
        assert goals.class_ids.tolist() == [[1, 0]]
        assert goals.score(0) == 4
        changed = torch.zeros(2, 3, 1, 3)
        changed[1, 1] = torch.tensor([[5.0, 1.0, 2.0]])
        assert goals.scores_of(0, changed).tolist() == [[0, 0], [3, 0]]
        np.testing.assert_allclose(goals.probabilities(0, changed)[0], [1 / 3, 1 / 3], rtol=1e-5)

    def test_fixed_goals_keep_each_class_its_own_pixels(self):
        goals = PixelGoals(self.LOGITS, [Pixels(TopK(2))], score=Score.LOGIT)
        fixed = goals.by_name(0)
        assert fixed.mask.shape == (2, 1, 3)
        again = PixelGoals(torch.ones(1, 3, 1, 3), [fixed], score=Score.LOGIT)
        assert [float(again.score(k)) for k in range(2)] == [2, 1]

    def test_largest_within_a_mask(self):
        mask = np.array([[True, False, False]])
        goals = PixelGoals(self.LOGITS, [Pixels(TopK(2), mask)], score=Score.LOGIT)
        assert goals.class_ids.tolist() == [[0]]
        (finding,) = goals.result(0, *np.zeros((3, 1))).findings
        assert (finding.logit, finding.area) == (2, pytest.approx(1 / 3))

    def test_other_outputs_and_targets_are_refused(self):
        with pytest.raises(TypeError, match="explains pixels"):
            Segmentation(OutputReading(of_pixels=True)).goals(
                self.LOGITS, [Detections(0.5, 1)], score=Score.LOGIT, run=lambda _: None
            )
        with pytest.raises(ModelLoadError, match=r"scores of shape \(1, 5, 2, 2\), not \(1, 4, h, w\)"):
            Segmentation(OutputReading(of_pixels=True)).total(torch.zeros(1, 5, 2, 2), 4)
