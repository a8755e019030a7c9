"""Detection: gradients by hand for every family, the grad-cam package's recipe for pyramids, and what is not found."""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_grad_cam import EigenCAM
from pytorch_grad_cam.utils.model_targets import FasterRCNNBoxScoreTarget
from pytorch_grad_cam.utils.reshape_transforms import fasterrcnn_reshape_transform
from torchvision.ops import box_iou

from heatlens_server.backends.torch.cam.saliency import Part
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.goals.detection import BoxGoals, Detection
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import InvalidArgument, ModelLoadError
from heatlens_server.core.methods import ABSENT, Method, Metric, Score
from heatlens_server.core.targets import Boxes, Detections, TopK
from heatlens_server.maps.steps import rise
from task_models import DETECTORS, LABELS, PX, by_hand, detector, photos, raw, recorded

TWO = Detections(min_score=0.5, max_count=2)
NOTHING = Detections(min_score=1.0, max_count=5)


@pytest.fixture(scope="module", params=DETECTORS)
def family(request):
    """A detector and its engine."""
    model = detector(request.param)
    untouched = copy.deepcopy(model.module)
    engine = TorchEngine(model, device="cpu")
    yield model, engine, untouched
    engine.close()


@pytest.fixture(scope="module")
def faster_rcnn():
    engine = TorchEngine(detector("faster-rcnn"), device="cpu")
    yield engine
    engine.close()


def tensor(image):
    return torch.from_numpy(image).permute(2, 0, 1) / 255


def run(engine, image, target, spec, rows=64):
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    steps = engine.steps(image, target, spec, rows=rows)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY])
def test_gradients_equal_autograd_by_hand(family, score):
    model, engine, untouched = family
    image, layer = photos()[1], model.layers[0]
    activations, output = recorded(untouched, layer, [tensor(image)])
    (precise,) = copy.deepcopy(untouched).double()([tensor(image).double()])
    scores, found = output[0]["scores"], {name: values.detach() for name, values in output[0].items()}
    method = Method.GRAD_CAM if score is Score.LOGIT else Method.HI_RES_CAM
    result = run(engine, image, TWO, MapSpec(method, (layer,), upsample=False, score=score))
    assert len(result.findings) == 2
    for k, finding in enumerate(result.findings):
        place = int(scores.argsort(descending=True, stable=True)[k])
        own = scores[place].logit() if score is Score.LOGIT else scores[place]
        (gradient,) = torch.autograd.grad(own, activations, retain_graph=True)
        assert gradient.abs().max() > 0
        expected = by_hand(method, activations, gradient)
        np.testing.assert_allclose(raw(result, k), expected, rtol=1e-2, atol=2e-4 * max(expected.max(), 1e-6))
        assert finding.class_id == int(found["labels"][place]) == result.class_ids[k]
        # As the verification of exports: float64 judges, and float32 may miss it by four times what the network does.
        own_error = abs(float(found["scores"][place]) - float(precise["scores"][place]))
        assert finding.probability == pytest.approx(float(precise["scores"][place]), abs=max(1e-6, 4 * own_error))
        assert finding.logit == pytest.approx(math.log(finding.probability / (1 - finding.probability)), rel=1e-2)
        np.testing.assert_allclose(finding.box, found["boxes"][place], atol=1e-2)
    assert max(result.scales) > 0
    assert result.logits.shape == (0,)


def test_a_batch_says_what_each_image_says_alone(family):
    model, engine, _ = family
    images = photos()
    spec = MapSpec(Method.GRAD_CAM, model.layers[:1], upsample=True)
    best = [run(engine, image, Detections(0.0, 1), spec).findings[0].probability for image in images]
    # So that two images have nothing to explain.
    target = Detections(min_score=(sorted(best)[1] + max(best)) / 2, max_count=3)
    together = engine.explain(images, [target] * 3, spec)
    assert sorted(len(result.findings) > 0 for result in together) == [False, False, True]
    for image, result in zip(images, together, strict=True):
        alone = run(engine, image, target, spec)
        assert result.class_ids == alone.class_ids
        assert result.maps.shape == (len(alone.findings), PX, PX)
        for k, (one, other) in enumerate(zip(result.findings, alone.findings, strict=True)):
            np.testing.assert_allclose(one.box, other.box, atol=1e-2)
            np.testing.assert_allclose(raw(result, k), raw(alone, k), rtol=1e-2, atol=1e-3 * max(alone.scales))


@pytest.mark.parametrize(
    "options",
    [
        {"method": Method.GRAD_CAM},
        {"method": Method.GUIDED_GRAD_CAM},
        {"method": Method.ABLATION_CAM},
        {"method": Method.EIGEN_CAM, "layers": ("backbone",)},
        {"method": Method.HI_RES_CAM, "metrics": (Metric.DELETION,)},
    ],
)
def test_nothing_found_is_an_answer(faster_rcnn, options):
    spec = MapSpec(**({"layers": ("backbone.body.layer4",), "upsample": True} | options))
    result = run(faster_rcnn, photos()[0], NOTHING, spec)
    assert result.maps.shape == (0, PX, PX)
    assert result.scales.shape == result.offsets.shape == (0,)
    assert result.class_ids == result.findings == ()
    assert result.faithfulness == (() if spec.metrics else None)


def test_images_of_different_sizes_and_their_boxes(faster_rcnn):
    for height, width in ((64, 150), (120, 70)):
        image = photos(height, width)[0]
        spec = MapSpec(Method.LAYER_CAM, ("backbone.body.layer3",), upsample=True)
        result = run(faster_rcnn, image, Detections(0.1, 9), spec)
        assert result.maps.shape == (len(result.findings), height, width)
        assert result.findings
        for left, top, right, bottom in (finding.box for finding in result.findings):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


@pytest.mark.parametrize("method", [Method.HI_RES_CAM, Method.RECIPRO_CAM])
def test_maps_end_where_the_image_does(faster_rcnn, method):
    """torchvision pads images to multiples of 32 pixels: of 160 columns that the layer saw, the image has 130."""
    image, layer = photos(PX, 130)[0], "backbone.body.layer2"
    module = detector("faster-rcnn").module
    activations, output = recorded(module, layer, [tensor(image)])
    assert activations.shape[2:] == (12, 20)
    result = run(faster_rcnn, image, Detections(0.1, 1), MapSpec(method, (layer,), upsample=False))
    assert result.maps.shape == (1, 12, 16)
    assert run(faster_rcnn, image, NOTHING, MapSpec(method, (layer,), upsample=False)).maps.shape == (0, 12, 16)
    if method is Method.HI_RES_CAM:
        best = output[0]["scores"].argmax()
        (gradient,) = torch.autograd.grad(output[0]["scores"][best].logit(), activations)
        expected = (gradient * activations).sum(1)[0].detach().numpy()
        # The 16 columns of the map are 1.016 columns of the layer wide.
        centres = (np.arange(16) + 0.5) / 16 * 130 / 8 - 0.5
        expected = np.stack([np.interp(centres, np.arange(20), row) for row in expected])
        np.testing.assert_allclose(raw(result, 0), np.maximum(expected, 0), atol=1e-3 * expected.max())


@pytest.mark.parametrize("family", ["faster-rcnn", "ssd"])
def test_the_share_of_the_image_is_that_of_the_networks_own_transform(family):
    module = detector(family).module
    for size in ((96, 96), (96, 130), (70, 101), (333, 20), (1, 1), (500, 499)):
        batch, _ = module.transform([torch.zeros(3, *size)])
        ((height, width),) = batch.image_sizes
        padded = batch.tensors.shape[2:]
        assert Detection().part_on_image(module, (3, *size)) == Part(bottom=height / padded[0], right=width / padded[1])


def test_every_method_gives_finite_maps(faster_rcnn, monkeypatch):
    monkeypatch.setattr(rise, "RISE_MASKS", 50)
    info = faster_rcnn.info
    assert info.multi_map_layers == {"backbone"}
    assert {Method.CAM, Method.FULL_GRAD, Method.SHAPLEY_CAM}.isdisjoint(info.methods)
    assert (info.input_height_px, info.input_width_px, info.class_count) == (0, 0, LABELS)
    for method in info.methods:
        if method is Method.SS_CAM:  # Score-CAM 35 times over
            continue
        layers = ("backbone",) if "backbone" in info.layers_of(method) else info.layers[:1]
        if method is Method.FEM:  # of four places none stands out
            layers = ("backbone.body.layer1",)
        result = run(faster_rcnn, photos()[0], TWO, MapSpec(method, layers, upsample=False))
        assert np.isfinite(result.maps).all(), method
        # The boxes of random weights are lost in every noisy copy.
        assert method is Method.SMOOTH_GRAD_CAM_PLUS_PLUS or (result.scales > 0).any(), method


def test_eigen_cam_of_a_pyramid_as_in_the_tutorial(faster_rcnn):
    model = detector("faster-rcnn").module
    inputs = tensor(photos()[0])[None]
    result = run(faster_rcnn, photos()[0], TWO, MapSpec(Method.EIGEN_CAM, ("backbone",), upsample=False))
    found = model(inputs)[0]
    targets = [FasterRCNNBoxScoreTarget(labels=found["labels"][:2], bounding_boxes=found["boxes"][:2])]
    with EigenCAM(model, [model.backbone], reshape_transform=fasterrcnn_reshape_transform) as cam:
        cam(inputs, targets=targets)
        theirs = cam.compute_cam_per_layer(inputs, targets, eigen_smooth=False)
        principal = cam.get_cam_image(
            inputs, model.backbone, targets, cam.activations_and_grads.activations[0].numpy(), None, eigen_smooth=False
        )[0]
    assert theirs
    ours = raw(result, 0)
    # A component has no sign; ours is fixed.
    candidates = [np.maximum(sign * principal, 0) for sign in (1, -1)]
    assert min(np.abs(ours - candidate).max() for candidate in candidates) < 1e-4 * np.abs(principal).max()
    np.testing.assert_array_equal(result.maps[0], result.maps[1])


def test_ablation_cam_of_a_pyramid_by_hand(faster_rcnn):
    """The tutorial's recipe with channels set to zero, one whole run of the network per channel of each level."""
    model, image = detector("faster-rcnn").module, photos()[0]
    levels = {}
    model.backbone.register_forward_hook(lambda _m, _a, out: levels.update(out) if not levels else None)
    (found,) = model([tensor(image)])
    label, box = found["labels"][0], found["boxes"][0]

    def score(output):
        overlaps = box_iou(box[None], output["boxes"])[0].where(output["labels"] == label, 0.0)
        best = int(overlaps.argmax())
        return float(overlaps[best] + output["scores"][best]) if overlaps[best] > 0.5 else 0.0

    falls = []
    for name, level in levels.items():
        for channel in range(level.shape[1]):

            def without(_m, _a, out, name=name, channel=channel):
                changed = {key: value.clone() for key, value in out.items()}
                changed[name][:, channel] = 0
                return changed

            handle = model.backbone.register_forward_hook(without)
            falls.append((score(found) - score(model([tensor(image)])[0])) / score(found))
            handle.remove()
    features = fasterrcnn_reshape_transform(levels)[0]
    expected = (torch.tensor(falls)[:, None, None] * features).sum(0).relu().numpy()
    assert expected.max() > 0
    spec = MapSpec(Method.ABLATION_CAM, ("backbone",), upsample=False)
    result = run(faster_rcnn, image, Detections(0.5, 1), spec, rows=5)
    np.testing.assert_allclose(raw(result, 0), expected, atol=1e-3 * expected.max())


@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.RECIPRO_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS])
def test_a_pyramid_has_no_gradient(faster_rcnn, method):
    spec = MapSpec(method, ("backbone.body.layer4", "backbone"), upsample=False)
    with pytest.raises(InvalidArgument, match=r"layers\[1\]: .* does not explain 'backbone'"):
        run(faster_rcnn, photos()[0], TWO, spec)
    assert "backbone" not in faster_rcnn.info.layers_of(method)


def test_faithfulness_of_a_detection(faster_rcnn):
    metrics = (Metric.DELETION, Metric.INSERTION, Metric.MODEL_RANDOMISATION)
    spec = MapSpec(Method.GRAD_CAM, ("backbone.body.layer4",), upsample=False, metrics=metrics)
    result = run(faster_rcnn, photos()[0], TWO, spec)
    assert len(result.faithfulness) == 2
    for measures in result.faithfulness:
        assert set(measures) == set(metrics)
        assert all(math.isfinite(value) for value in measures.values())
        assert 0 <= measures[Metric.DELETION] <= 1


FOUND = {
    "boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 40, 50]]),
    "labels": torch.tensor([1, 2, 3]),
    "scores": torch.tensor([0.6, 0.9, 0.7], requires_grad=True),
}


def test_half_precision_is_refused():
    with pytest.raises(ModelLoadError, match="precision: a model for detection runs in fp32, not fp16"):
        TorchEngine(detector("faster-rcnn"), device="cpu", precision="fp16")


class TestMatching:
    """Boxes of changed images."""

    def goals(self, target, score=Score.LOGIT):
        return BoxGoals([FOUND], [target], score=score)

    def changed(self, boxes, labels, scores):
        return {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores, dtype=torch.float32),
        }

    def test_best_first_above_the_threshold_and_of_the_classes_asked_for(self):
        assert self.goals(Detections(0.65, 5)).class_ids.tolist() == [[2, 3]]
        assert self.goals(Detections(0.0, 2)).class_ids.tolist() == [[2, 3]]
        assert self.goals(Detections(0.0, 5, (1, 3))).class_ids.tolist() == [[3, 1]]
        nothing = self.goals(Detections(0.95, 5))
        assert nothing.class_ids.tolist() == [[ABSENT]]
        (gradient,) = torch.autograd.grad(nothing.score(0), FOUND["scores"])
        assert not gradient.any()

    def test_a_changed_image_has_the_box_of_the_same_label_that_overlaps_most(self):
        goals = self.goals(Detections(0.5, 2))
        assert goals.class_ids.tolist() == [[2, 3]]
        output = [
            # A rival of another label lies better, and one of the same label worse but surer.
            self.changed([[20, 20, 30, 30], [20, 20, 30, 28], [20, 20, 30, 26]], [1, 2, 2], [0.9, 0.4, 0.8]),
            self.changed([[20, 20, 30, 25]], [2], [0.9]),
            self.changed([], [], []),
        ]
        np.testing.assert_allclose(goals.scores_of(0, output), [[0.8 + 0.4, 0], [0, 0], [0, 0]], atol=1e-6)
        np.testing.assert_allclose(goals.probabilities(0, output), [[0.8 * 0.4, 0], [0, 0], [0, 0]], atol=1e-6)

    def test_agrees_with_the_package_where_labels_do_not_compete(self):
        goals = self.goals(Detections(0.8, 1))
        output = self.changed([[21, 20, 30, 30], [0, 0, 9, 9]], [2, 1], [0.3, 0.9])
        theirs = FasterRCNNBoxScoreTarget(labels=[2], bounding_boxes=[FOUND["boxes"][1].numpy()])
        assert float(goals.scores_of(0, [output])[0, 0]) == pytest.approx(float(theirs(output)))

    def test_fixed_detections_are_found_again_or_score_nothing(self):
        fixed = self.goals(Detections(0.5, 3)).by_name(0)
        assert fixed == Boxes(((20, 20, 30, 30), (40, 40, 40, 50), (0, 0, 10, 10)), (2, 3, 1))
        again = BoxGoals(
            [self.changed([[0, 0, 10, 9], [60, 60, 70, 70]], [1, 2], [0.2, 0.9])], [fixed], score=Score.PROBABILITY
        )
        assert [float(again.score(k)) for k in range(3)] == pytest.approx([0, 0, 0.2])

    def test_a_score_of_one_has_a_finite_logit_and_gradient(self):
        scores = torch.tensor([1.0], requires_grad=True)
        found = {"boxes": torch.tensor([[0.0, 0, 1, 1]]), "labels": torch.tensor([1]), "scores": scores}
        goals = BoxGoals([found], [Detections(0.5, 1)], score=Score.LOGIT)
        (gradient,) = torch.autograd.grad(goals.score(0), scores)
        assert gradient.isfinite().all()
        assert math.isfinite(goals.result(0, *np.zeros((3, 1))).findings[0].logit)

    def test_targets_of_other_tasks_are_refused(self):
        with pytest.raises(TypeError, match="a detector explains detections"):
            Detection().goals([FOUND], [TopK(1)], score=Score.LOGIT, run=lambda _: None)
