"""What is found in files of detectors: form of boxes, scores, layer; what overrides it, and what is refused."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import tiny_models
from box_networks import BOXES, CLASSES, PX, Corners, Detr, EndToEnd, YoloV5, YoloV8, made
from heatlens_server.backends.onnx import network
from heatlens_server.backends.onnx.network import RowScores
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.tasks import Task
from mask_models import Changed
from onnx_files import write_onnx

PAIR = ("logits", "pred_boxes")


def load(path, **changes):
    preprocess = changes.pop("preprocess", {"mean": [0.5], "std": [0.25]})
    return load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess=preprocess, **changes))


def written(make, folder, names=("output0",), **options):
    return write_onnx(made(make, 3.0), folder / "m.onnx", shape=(1, 3, PX, PX), names=names, **options)


def told(loaded):
    return " ".join(loaded.assumptions)


@pytest.mark.parametrize(
    ("make", "names", "form", "count", "scores", "boxes", "overlap"),
    [
        (YoloV8, ("output0",), "yolov8", BOXES, RowScores.SIGMOID, "cxcywh", 0.7),
        (YoloV5, ("output0",), "yolov5", 2 * BOXES, RowScores.PROBABILITY, "cxcywh", 0.45),
        (lambda: Detr(nothing=False), PAIR, "detr", 12, RowScores.SIGMOID, "cxcywh-relative", 1.0),
    ],
)
def test_the_form_is_found_and_said(tmp_path, make, names, form, count, scores, boxes, overlap):
    loaded = load(written(make, tmp_path, names))
    assert (loaded.info.task, loaded.info.class_count) == (Task.DETECTION, CLASSES)
    detector = loaded.info.detector
    assert (detector.scores, detector.most_overlap) == (scores, overlap)
    assert f'detector = "{form}": {count} boxes, boxes = "{boxes}", with scores of 3 classes' in told(loaded)
    assert 'the task "detection"' in told(loaded)
    assert loaded.info.takes_batches
    settled = load(tmp_path / "m.onnx", task="detection", detector=form, boxes=boxes)
    assert settled.info == loaded.info
    assert not any(word in told(settled) for word in ("read as a detector", "makes the task"))


def test_the_layer_is_one_on_which_all_boxes_depend(tmp_path):
    """The finest map of the neck: each of the coarser ones on the way down is for boxes of its own."""
    loaded = load(written(YoloV8, tmp_path))
    names = [layer.name for layer in loaded.info.layers]
    assert "/neck/up.1/" in names[0]
    assert [(layer.height, name.split("/")[3]) for name, layer in zip(names, loaded.info.layers, strict=True)] == [
        (8, "up.1"),
        (2, "down.2"),
        (4, "up.0"),
        (16, "stem"),
        (32, "stem"),
    ]
    assert "the last tensor of the file on which the scores of all boxes depend" in told(loaded)
    choices = " ".join(loaded.layer_choices)
    assert "merge.1" in choices, "any of the neck may be named"
    assert "places" not in choices, "boxes are not explained"
    named = load(tmp_path / "m.onnx", layers=("/module/neck/merge.1/merge.1.1/Mul_output_0",))
    assert named.info.layers[0].height == 2


def test_tokens_of_an_encoder_are_a_layer_and_queries_are_none(tmp_path):
    loaded = load(written(lambda: Detr(queries=66, nothing=False), tmp_path, PAIR))
    assert (loaded.info.layers[0].name.split("/")[2], loaded.info.layers[0].height) == ("norm", 8)
    assert not any("decode" in line or "hidden" in line for line in loaded.layer_choices)


class Sure(nn.Module):
    """A detector of which most boxes are of nothing."""

    def __init__(self):
        super().__init__()
        self.inner = Detr()
        with torch.no_grad():
            self.inner.classes.bias[-1] += 30

    def forward(self, x):
        return self.inner(x)


def test_whether_the_last_class_is_that_of_nothing_is_seen_by_running(tmp_path):
    path = written(Sure, tmp_path, PAIR)
    loaded = load(path)
    assert (loaded.info.detector.scores, loaded.info.class_count) == (RowScores.SOFTMAX, CLASSES)
    assert 'taken as that of no class: activation = "softmax"' in told(loaded)
    other = load(path, task="detection", activation="sigmoid")
    assert (other.info.detector.scores, other.info.class_count) == (RowScores.SIGMOID, CLASSES + 1)
    assert "activation" not in told(other)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda found: (found[0].softmax(-1), found[1]), RowScores.SOFTMAX),
        (lambda found: (found[0].sigmoid(), found[1]), RowScores.SIGMOID),
        (lambda found: (found[0].softmax(-1)[..., :-1], found[1]), RowScores.PROBABILITY),
    ],
)
def test_what_scores_end_in_is_left_behind_where_it_can_be(tmp_path, change, kind):
    loaded = load(written(lambda: Changed(Detr(), change), tmp_path, PAIR))
    assert loaded.info.detector.scores is kind
    assert loaded.info.class_count == (CLASSES + 1 if kind is RowScores.SIGMOID else CLASSES)


def test_metadata_of_ultralytics(tmp_path):
    path = written(lambda: YoloV8(extra=2), tmp_path)
    model = onnx.load(path)
    for key, value in {"task": "detect", "imgsz": "[64, 64]", "names": "{0: 'cat', 1: 'dog', 2: 'bird'}"}.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    loaded = load(path, preprocess={})
    assert (loaded.info.class_count, loaded.labels) == (CLASSES, ("cat", "dog", "bird"))
    assert loaded.info.preprocess.letterbox
    assert loaded.info.preprocess.scale == 1.0
    assert "ImageNet" not in told(loaded)


def test_boxes_that_need_no_suppression(tmp_path):
    path = written(EndToEnd, tmp_path)
    with pytest.raises(ModelLoadError, match="0 outputs look like scores"):
        load(path)
    with pytest.raises(ModelLoadError, match="labels: the file does not tell how many classes"):
        load(path, task="detection")
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n")
    loaded = load(path, task="detection", labels=tmp_path / "names.txt")
    assert 'detector = "end2end": 30 boxes, boxes = "xyxy", with scores of 3 classes' in told(loaded)
    assert (loaded.info.detector.most_overlap, loaded.info.class_count) == (1.0, CLASSES)
    assert "/neck/up.1/" in loaded.info.layers[0].name


def test_boxes_are_what_the_configuration_says(tmp_path):
    detector = load(written(YoloV8, tmp_path), boxes="yxyx-relative").info.detector
    assert (detector.corners, detector.is_relative) == (network.Corners.YX, True)


def test_a_size_that_the_file_leaves_open_must_be_given(tmp_path):
    path = written(YoloV8, tmp_path)
    model = onnx.load(path)
    for place, name in ((2, "height"), (3, "width")):
        model.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    onnx.save(model, path)
    with pytest.raises(ModelLoadError, match="detection needs crop_px"):
        load(path, task="detection", detector="yolov8")


class Rows(nn.Module):
    """Some rows of numbers."""

    def __init__(self, *shape):
        super().__init__()
        self.body, self.shape = tiny_models.tiny(), shape
        self.body.head = nn.Linear(16, shape[0] * shape[1])

    def forward(self, x):
        return self.body(x).reshape(-1, *self.shape)


@pytest.mark.parametrize(
    ("make", "names", "options", "message"),
    [
        # Boxes that are left after suppression, and letters of a line of text.
        (lambda: Rows(300, 7), ("output0",), {"task": "detection"}, r"0 outputs look like .* output0 \(-1, 300, 7\)"),
        (lambda: Rows(40, 97), ("output0",), {}, r"0 outputs look like scores \(N, classes\)"),
        (tiny_models.tiny, ("logits",), {"task": "detection"}, "0 outputs look like those of a detector.*set output"),
        (YoloV8, ("output0",), {"detector": "detr"}, "0 outputs look like those of a detector"),
        (YoloV8, ("output0",), {"output": "other"}, 'output = "NAME".*detector = "yolov8"'),
        (YoloV8, ("output0",), {"threshold": 0.3}, "threshold: is for segmentation; .* min_score"),
        (YoloV8, ("output0",), {"detector": "yolov8", "output": 0}, "output: the outputs of a file have names"),
        (YoloV8, ("output0",), {"detector": "nms"}, "no operator NonMaxSuppression"),
        (YoloV8, ("output0",), {"labels": "names.txt"}, "has 7 names, but the model has 3 classes"),
        (Detr, ("one", "other"), {"task": "detection"}, "2 outputs look like those of a detector"),
    ],
)
def test_refusals(tmp_path, make, names, options, message):
    (tmp_path / "names.txt").write_text("x\n" * 7)
    options = {key: tmp_path / value if key == "labels" else value for key, value in options.items()}
    with pytest.raises(ModelLoadError, match=message):
        load(written(make, tmp_path, names), **options)


def test_an_output_of_four_columns_is_told_from_boxes_by_its_name(tmp_path):
    assert load(written(Detr, tmp_path, PAIR)).scores.output.name == "logits"
    assert load(written(Detr, tmp_path, ("one", "two")), output="one").scores.output.name == "one"


def test_several_operators_of_suppression_are_refused(tmp_path):
    path = written(Corners, tmp_path, ("boxes", "scores"))
    model = onnx.load(path)
    for name in ("first", "second"):
        model.graph.node.append(helper.make_node("NonMaxSuppression", ["boxes", "scores"], [name]))
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT64, [None, 3]))
    onnx.save(model, path)
    with pytest.raises(ModelLoadError, match="has 2 operators NonMaxSuppression"):
        load(path)


def test_boxes_of_no_fixed_number_are_refused(tmp_path):
    """As where boxes are chosen by their score before suppression."""
    path = written(Corners, tmp_path, ("boxes", "scores"))
    model = onnx.load(path)
    nodes = [
        helper.make_node("ReduceMax", ["scores"], ["best"], axes=[0, 1], keepdims=0),
        helper.make_node("Greater", ["best", "least"], ["sure"]),
        helper.make_node("NonZero", ["sure"], ["places"]),
        helper.make_node("Flatten", ["places"], ["row"], axis=0),
        helper.make_node("Squeeze", ["row"], ["index"]),
        helper.make_node("Gather", ["boxes", "index"], ["some_boxes"], axis=1),
        helper.make_node("Gather", ["scores", "index"], ["some_scores"], axis=2),
        helper.make_node("NonMaxSuppression", ["some_boxes", "some_scores"], ["selected"]),
    ]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.6, np.float32), "least"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("selected", TensorProto.INT64, [None, 3]))
    onnx.save(model, path)
    with pytest.raises(ModelLoadError, match=r"NonMaxSuppression takes, 'some_boxes' .* not of a fixed number"):
        load(path)
