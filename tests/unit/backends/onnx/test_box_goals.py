"""Detections by a file: what the torch engine says of the same detector, and what autograd does in float64."""

import copy
import dataclasses

import numpy as np
import onnx
import pytest
import torch

from box_networks import CLASSES, PX, Corners, Detr, EndToEnd, Listed, YoloV5, YoloV8, made
from heatlens_server.backends.onnx import network
from heatlens_server.backends.onnx.box_goals import BoxGoals, best_of, corners_of, overlaps_with, probabilities_of
from heatlens_server.backends.onnx.network import Detector, RowScores
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import Boxes, Detections, TopK
from onnx_files import write_onnx
from task_models import detector, photos

LAYER = "neck.up.1"
SCALE = 3.0


def engine_of(module, path, layers, names=("output0",), **options):
    write_onnx(module, path, shape=(1, 3, PX, PX), layers=layers, names=names)
    preprocess = {"mean": [0.0], "std": [1.0]}
    config = ModelConfig(
        name="m", source=f"onnx:{path}", task="detection", layers=layers, preprocess=preprocess, **options
    )
    return NetworkEngine(load_file(path, config), device="cpu", threads=1)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The engine of a file, and the torch engine of the same detector with torchvision's interface."""
    module = made(YoloV8, SCALE)
    engine = engine_of(module, tmp_path_factory.mktemp("file") / "m.onnx", (LAYER,))
    own = {"layers": (f"inner.{LAYER}",), "class_count": CLASSES, "grids": {}}
    listed = dataclasses.replace(detector("ssd"), module=Listed(copy.deepcopy(module), 0.7).eval(), **own)
    torch_engine = TorchEngine(listed, device="cpu")
    yield engine, torch_engine
    torch_engine.close()


def explained(engine, targets, method=Method.GRAD_CAM, score=Score.LOGIT):
    spec = MapSpec(method, engine.info.layers[:1], upsample=False, score=score)
    return engine.explain(photos(PX, PX)[: len(targets)], targets, spec)


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY])
@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.HI_RES_CAM])
def test_a_file_says_what_torch_says(both, method, score):
    targets = [Detections(0.0, 8), Detections(0.5, 3), Detections(0.0, 4, (2, 0))]
    results = [explained(engine, targets, method, score) for engine in both]
    for mine, theirs in zip(*results, strict=True):
        assert mine.class_ids == theirs.class_ids
        np.testing.assert_allclose(mine.maps, theirs.maps, atol=1e-4)
        np.testing.assert_allclose(mine.scales, theirs.scales, rtol=2e-4, atol=1e-7)
        for one, other in zip(mine.findings, theirs.findings, strict=True):
            assert one.box == pytest.approx(other.box, abs=1e-3)
            assert (one.logit, one.probability) == pytest.approx((other.logit, other.probability), rel=1e-3, abs=1e-5)
    assert len({class_id for result in results[0] for class_id in result.class_ids}) > 1
    assert any(mine.maps.any() for mine in results[0])


def test_a_box_that_is_asked_for_is_the_detection_that_was_found_there(both):
    """By a box of about its place and its class; nothing is where no box of the class is."""
    found = explained(both[0], [Detections(0.0, 2)])[0]
    moved = tuple(min(side + 0.5, PX) for side in found.findings[0].box)
    nowhere = (1.0, 1.0, 1.5, 1.5)
    target = Boxes((moved, found.findings[1].box, nowhere), (*found.class_ids, 0))
    for engine in both:
        result = explained(engine, [target])[0]
        np.testing.assert_allclose([finding.box for finding in result.findings], target.boxes, atol=1e-4)
        assert result.class_ids == target.class_ids
        np.testing.assert_allclose(result.maps[:2], found.maps, atol=1e-4)
        assert not result.maps[2].any()
        assert result.findings[2].probability == 0.0


def test_a_batch_says_what_each_image_says_alone(both):
    targets = [Detections(0.0, 1), Detections(1.0, 4), Detections(0.0, 6)]
    together = explained(both[0], targets)
    assert [len(result.class_ids) for result in together][1] == 0
    spec = MapSpec(Method.GRAD_CAM, both[0].info.layers[:1], upsample=False)
    for image, target, result in zip(photos(PX, PX), targets, together, strict=True):
        (alone,) = both[0].explain(image[None], [target], spec)
        np.testing.assert_allclose(result.maps, alone.maps, atol=1e-5)
        assert result.class_ids == alone.class_ids


def in_steps(engine, image, target, spec):
    steps = engine.steps(image, target, spec, rows=16)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("method", [Method.SCORE_CAM, Method.ABLATION_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS])
def test_methods_of_many_runs_explain_boxes(both, method):
    engine, image = both[0], photos(PX, PX)[0]
    spec = MapSpec(method, engine.info.layers[:1], upsample=False, metrics=(Metric.DELETION, Metric.INSERTION))
    result = in_steps(engine, image, Detections(0.0, 2), spec)
    assert result.maps.max() == 1.0
    # With the whole image inserted, or nothing deleted, it is the probability that is found.
    probability = max(finding.probability for finding in result.findings)
    assert all(0 < of_goal[Metric.INSERTION] <= probability for of_goal in result.faithfulness)
    nothing = in_steps(engine, image, Detections(1.0, 2), spec)
    assert (nothing.class_ids, nothing.faithfulness, len(nothing.maps)) == ((), (), 0)


def test_a_changed_version_is_scored_by_overlap_and_probability():
    """Of two rows near the box the one whose product is larger; none is near in the second version."""
    about = Detector(RowScores.PROBABILITY, network.Corners.XY, is_relative=False, most_overlap=1.0)
    box = (0.0, 0.0, 10.0, 10.0)
    boxes = np.array([[box, (0, 0, 10, 8), (50, 50, 60, 60)], [(50, 50, 60, 60)] * 3], np.float32)
    scores = np.array([[[0.3, 0.9], [0.5, 0.2], [0.9, 0.9]], [[0.9, 0.9]] * 3], np.float32)
    outputs = {"scores": scores, "boxes": boxes}
    goals = BoxGoals(outputs, [Boxes((box,), (0,))] * 2, detector=about, size_px=(64, 64), score=Score.LOGIT)
    np.testing.assert_allclose(goals.scores_of(0, outputs), [[0.8 + 0.5], [0.0]], rtol=1e-6)
    np.testing.assert_allclose(goals.probabilities(0, outputs), [[0.8 * 0.5], [0.0]], rtol=1e-6)
    assert goals.by_name(1) == Boxes((box,), (0,))
    assert goals.least_probable(0) is None


def of_v8(module, x):
    _boxes, logits = module.parts(x)
    return logits.transpose(1, 2).sigmoid()


def of_v5(module, x):
    scores = module(x)
    return scores[..., 4:5] * scores[..., 5:]


def of_end2end(module, x):
    rows = module(x)
    return rows[..., 4:5] * (rows[..., 5:] == torch.arange(CLASSES))


def of_detr(module, x):
    return module(x)[0].softmax(-1)[..., :-1]


def of_rt_detr(module, x):
    return module(x)[0].sigmoid()


FORMS = {
    "yolov8": (YoloV8, ("output0",), LAYER, of_v8, {}),
    "yolov8-masks": (lambda: YoloV8(extra=2), ("output0",), LAYER, of_v8, {"labels": "names.txt"}),
    "yolov5": (YoloV5, ("output0",), LAYER, of_v5, {}),
    "end2end": (EndToEnd, ("output0",), f"inner.{LAYER}", of_end2end, {"labels": "names.txt"}),
    "detr": (Detr, ("logits", "pred_boxes"), "norm", of_detr, {"activation": "softmax"}),
    "rt-detr": (
        lambda: Detr(nothing=False), ("logits", "pred_boxes"), "norm", of_rt_detr, {"activation": "sigmoid"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("score", [Score.LOGIT, Score.PROBABILITY])
@pytest.mark.parametrize("form", FORMS)
def test_maps_agree_with_float64(tmp_path, form, score):
    make, names, layer, probabilities, options = FORMS[form]
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    options = {key: tmp_path / value if key == "labels" else value for key, value in options.items()}
    module = made(make, SCALE)
    engine = engine_of(module, tmp_path / "m.onnx", (layer,), names, **options)
    (result,) = explained(engine, [Detections(0.0, 3)], Method.HI_RES_CAM, score)
    exact, kept = copy.deepcopy(module).double(), []
    exact.get_submodule(layer).register_forward_hook(
        lambda _module, _given, output: (kept.append(output.requires_grad_()), output.clone())[1]
    )
    image = torch.from_numpy(photos(PX, PX)[0] / 255.0).permute(2, 0, 1)[None]
    scores = probabilities(exact, image)[0]
    for k, finding in enumerate(result.findings):
        row = (scores[:, finding.class_id] - finding.probability).abs().argmin()
        probability = scores[row, finding.class_id]
        assert probability.item() == pytest.approx(finding.probability, abs=1e-6)
        assert torch.logit(probability).item() == pytest.approx(finding.logit, abs=1e-4)
        total = torch.logit(probability) if score is Score.LOGIT else probability
        (gradient,) = torch.autograd.grad(total, kept[0], retain_graph=True)
        raw = (gradient * kept[0]).sum(-1 if layer == "norm" else 1)[0].reshape(8, 8).detach().numpy()
        mine = result.maps[k] * result.scales[k] + result.offsets[k]
        assert np.abs(raw).max() > 0
        np.testing.assert_allclose(mine, np.maximum(raw, 0), atol=2e-4 * np.abs(raw).max())


def with_suppression(path, *, center=False, producer="pytorch", overlap=0.6):
    """Let a file that returns boxes and scores go on with NonMaxSuppression, as end-to-end exports do."""
    model = onnx.load(path)
    model.producer_name = producer
    numbers = {"most": np.array([20]), "overlap": np.array([overlap], np.float32), "least": np.array([0.3], np.float32)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in numbers.items())
    node = onnx.helper.make_node(
        "NonMaxSuppression", ["boxes", "scores", *numbers], ["selected"], center_point_box=int(center)
    )
    model.graph.node.append(node)
    kept = [output for output in model.graph.output if output.name not in {"boxes", "scores"}]
    del model.graph.output[:]
    model.graph.output.extend(
        [*kept, onnx.helper.make_tensor_value_info("selected", onnx.TensorProto.INT64, [None, 3])]
    )
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("make", "producer", "boxes"),
    [
        (Corners, "pytorch", "xyxy"),
        (lambda: Corners((1, 0, 3, 2), 1 / PX), "tf2onnx", "yxyx-relative"),
    ],
)
@pytest.mark.parametrize("batch", [None, 1])
def test_a_file_with_suppression_inside_is_explained_by_what_goes_into_it(both, tmp_path, make, producer, boxes, batch):
    module = made(make, SCALE)
    path = write_onnx(module, tmp_path / "m.onnx", shape=(1, 3, PX, PX), names=("boxes", "scores"), batch=batch)
    with_suppression(path, producer=producer, overlap=0.7)
    loaded = load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess={"mean": [0.0], "std": [1.0]}))
    assert loaded.info.detector.most_overlap == pytest.approx(0.7)
    assert loaded.info.detector.scores is RowScores.SIGMOID
    assert any(f'detector = "nms": 84 boxes, boxes = "{boxes}"' in sentence for sentence in loaded.assumptions)
    assert loaded.info.takes_batches
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    mine, theirs = (explained(one, [Detections(0.0, 5)])[0] for one in (engine, both[0]))
    assert mine.class_ids == theirs.class_ids
    for one, other in zip(mine.findings, theirs.findings, strict=True):
        assert one.box == pytest.approx(other.box, abs=1e-3)
        assert one.logit == pytest.approx(other.logit, abs=1e-4)
    np.testing.assert_allclose(mine.maps, theirs.maps, atol=1e-4)


def goals_of(scores, boxes, target, kind=RowScores.PROBABILITY, score=Score.LOGIT, overlap=0.5):
    detector = Detector(kind, network.Corners.XY, False, overlap)
    outputs = {"scores": np.array([scores], np.float32), "boxes": np.array([boxes], np.float32)}
    return BoxGoals(outputs, [target], detector=detector, size_px=(10, 20), score=score)


ROWS = [[0, 0, 4, 4], [0, 0, 4, 3], [10, 0, 14, 4], [0, 0, 4, 3.5]]


def test_worse_boxes_of_one_class_are_left_out():
    goals = goals_of([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.6]], ROWS, Detections(0.2, 10))
    result = goals.result(0, *(np.zeros(shape, np.float32) for shape in ((3, 2, 2), (3,), (3,))))
    assert [finding.box for finding in result.findings] == [tuple(ROWS[row]) for row in (0, 2, 3)]
    assert result.class_ids == (0, 1, 1)
    assert goals.width == 3
    assert goals_of([[0.9, 0.1], [0.8, 0.2]], ROWS[:2], Detections(0.2, 10), overlap=1.0).width == 2


def test_slopes_by_hand():
    seed = goals_of([[0.8, 0.1]], ROWS[:1], Detections(0.0, 1)).seed(0)["scores"]
    np.testing.assert_allclose(seed, [[[1 / 0.8 + 1 / 0.2, 0]]], rtol=1e-6)
    seed = goals_of([[0.8, 0.1]], ROWS[:1], Detections(0.0, 1), score=Score.PROBABILITY).seed(0)["scores"]
    np.testing.assert_allclose(seed, [[[1, 0]]])
    # Rounded to 1, or to 0: finite.
    for probability, slope in ((1.0, 1.0), (0.0, 2.0**100)):
        seed = goals_of([[probability]], ROWS[:1], Detections(0.0, 1)).seed(0)["scores"]
        np.testing.assert_allclose(seed, [[[slope]]])


def test_forms_of_boxes():
    boxes = np.array([[0.1, 0.2, 0.5, 0.4]])
    size_px = (10, 20)
    for corners, expected in {
        network.Corners.XY: [2, 2, 10, 4],
        network.Corners.YX: [4, 1, 8, 5],
        network.Corners.CENTER: [0, 0, 7, 4],
    }.items():
        found = corners_of(boxes, Detector(RowScores.SIGMOID, corners, True, 1.0), size_px)
        np.testing.assert_allclose(found, [expected], atol=1e-12)
        turned = corners_of(boxes[:, [2, 3, 0, 1]], Detector(RowScores.SIGMOID, network.Corners.XY, True, 1.0), size_px)
        np.testing.assert_allclose(turned, [[2, 2, 10, 4]])


def test_overlaps_and_probabilities():
    box = np.array([0.0, 0.0, 4.0, 4.0])
    others = np.array([[0.0, 0.0, 4.0, 4.0], [2.0, 0.0, 6.0, 4.0], [9.0, 9.0, 9.0, 9.0]])
    np.testing.assert_allclose(overlaps_with(box, others), [1, 8 / 24, 0])
    assert overlaps_with(others[2], others[2:]) == 0
    logits = np.array([[1.0, 3.0, 2.0]])
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose(probabilities_of(logits, RowScores.SOFTMAX), expected[:, :2])
    np.testing.assert_allclose(probabilities_of(logits, RowScores.SIGMOID), 1 / (1 + np.exp(-logits)))
    assert [int(best_of(logits, kind)[0][0]) for kind in RowScores] == [1, 1, 1]


def test_targets_of_other_tasks_are_refused():
    with pytest.raises(TypeError, match="explains detections"):
        goals_of([[0.5]], ROWS[:1], TopK(1))
