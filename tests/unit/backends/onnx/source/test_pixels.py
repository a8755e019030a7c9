"""What is found in files for segmentation: scores, what they end in, the bottleneck; and what is refused."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mask_models
import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Pixels, TopK
from heatlens_server.core.tasks import Task
from mask_models import Changed
from onnx_files import write_onnx
from task_models import photos

PX = 64


def load(path, **changes):
    preprocess = {"mean": [0.5], "std": [0.25], **changes.pop("preprocess", {})}
    return load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess=preprocess, **changes))


def written(module, path, **options):
    return write_onnx(module, path, shape=(1, 3, PX, PX), **options)


def explained(loaded):
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False, return_mask=True)
    return engine.explain(photos(PX, PX), [Pixels(TopK(1))] * 3, spec)


@pytest.mark.parametrize(
    ("change", "threshold", "told"),
    [
        (lambda z: z, None, "3 output channels are taken to exclude each other"),
        (lambda z: F.softmax(z, 1), None, "is the softmax of"),
        (lambda z: F.log_softmax(z, 1), None, "is the softmax of"),
        (lambda z: z.sigmoid(), 0.5, "is the sigmoid of"),
        (lambda z: z.argmax(1), None, "is the class ids of"),
        (lambda z: F.softmax(z, 1).argmax(1, keepdim=True), None, "is the class ids of"),
        (lambda z: z.permute(0, 2, 3, 1), None, "exclude each other"),
        (lambda z: F.softmax(z.permute(0, 2, 3, 1), -1), None, "is the softmax of"),
    ],
    ids=["logits", "softmax", "log-softmax", "sigmoid", "ids", "ids-of-softmax", "channels-last", "both"],
)
def test_what_a_file_ends_in_is_left_behind(tmp_path, change, threshold, told):
    """Whatever it is, the maps are those of the logits."""
    loaded = load(written(Changed(mask_models.three(), change), tmp_path / "m.onnx"))
    assert (loaded.info.task, loaded.info.class_count, loaded.info.threshold) == (Task.SEGMENTATION, 3, threshold)
    assert any(told in sentence for sentence in loaded.assumptions)
    assert any('the task is "segmentation"' in sentence for sentence in loaded.assumptions)
    activation = "auto" if threshold is None else "sigmoid"
    plain = load(written(mask_models.three(), tmp_path / "plain.onnx"), task="segmentation", activation=activation)
    for mine, theirs in zip(explained(loaded), explained(plain), strict=True):
        np.testing.assert_allclose(mine.maps, theirs.maps, atol=1e-5)
        assert mine.findings[0].logit == pytest.approx(theirs.findings[0].logit, rel=1e-5)
        assert (mine.mask is None) == (threshold is not None)
        if mine.mask is not None:
            np.testing.assert_array_equal(mine.mask, theirs.mask)


def test_the_bottleneck_is_explained_and_what_comes_after_weights_is_offered(tmp_path):
    loaded = load(written(mask_models.three(), tmp_path / "m.onnx"))
    assert [(layer.channels, layer.height) for layer in loaded.info.layers] == [(32, 16), (16, 32), (8, 64)]
    (sentence,) = (one for one in loaded.assumptions if "the last tensor of the lowest resolution" in one)
    assert "and other paths to the scores go around it; layers overrides that" in sentence
    assert not any(line.startswith("layer 'logits'") for line in loaded.layer_choices)
    assert "d1" in loaded.layer_choices[-1]


class Pyramid(nn.Module):
    """Whose head pools a map of 12 places a side to 2 as well."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        self.level = nn.Sequential(nn.AvgPool2d(6), nn.Conv2d(8, 4, 1), nn.ReLU())
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        features = self.body(x)
        pooled = F.interpolate(self.level(features), scale_factor=6)
        return F.interpolate(self.head(torch.cat([features, pooled], 1)), size=x.shape[2:], mode="bilinear")


def test_levels_of_a_pyramid_are_no_bottleneck(tmp_path):
    path = write_onnx(Pyramid(), tmp_path / "m.onnx", shape=(1, 3, 96, 96))
    loaded = load(path)
    assert loaded.info.layers[0].height == 12
    assert not any("go around it" in sentence for sentence in loaded.assumptions)


def test_several_outputs_of_pixels(tmp_path):
    """Scores by their usual names, or else by the name that is set."""
    path = written(Changed(mask_models.three(), lambda z: (z, z.flip(1))), tmp_path / "m.onnx")
    model = onnx.load(path)
    first, second = (output.name for output in model.graph.output)
    assert (first, load(path).info.class_count) == ("logits", 3)
    by_name = load(path, output=second)
    assert by_name.scores.output.name == second
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]
        node.input[:] = ["scores" if name == "logits" else name for name in node.input]
    model.graph.output[0].name = "scores"
    onnx.save(model, path)
    with pytest.raises(ModelLoadError, match="2 outputs look like scores of pixels"):
        load(path, task="segmentation")


def test_a_size_that_the_file_leaves_open_must_be_given(tmp_path):
    path = written(mask_models.one(), tmp_path / "m.onnx")
    model = onnx.load(path)
    for value in (model.graph.input[0], model.graph.output[0]):
        for place, name in ((2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[place].dim_param = name
    onnx.save(model, path)
    with pytest.raises(ModelLoadError, match="the size of its input open: segmentation needs crop_px"):
        load(path)
    loaded = load(path, preprocess={"crop_px": [32, 96]})
    assert loaded.info.preprocess.resize_px == (32, 96)
    assert (loaded.info.layers[0].height, loaded.info.layers[0].width) == (8, 24)


def test_nothing_is_cut_off(tmp_path):
    """Classifiers look at the middle, and this is about the whole image."""
    preprocess = load(written(mask_models.one(), tmp_path / "m.onnx")).info.preprocess
    assert preprocess.resize_px == preprocess.crop_px == (PX, PX)
    assert load(written(tiny_models.tiny(), tmp_path / "c.onnx")).info.preprocess.resize_px != PX


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_models.tiny, {"task": "segmentation"}, "0 outputs look like scores of pixels .* logits"),
        (mask_models.one, {"task": "classification"}, r"0 outputs look like scores \(N, classes\)"),
        (mask_models.one, {"activation": "softmax"}, 'activation: .* one output channel, .* set "sigmoid"'),
        (mask_models.three_sigmoid, {"activation": "softmax"}, 'activation: .* set "sigmoid"'),
        (mask_models.three, {"threshold": 0.3}, 'threshold: is for activation = "sigmoid"'),
        (tiny_models.tiny, {"activation": "sigmoid"}, "activation: is softmax for classification"),
        (mask_models.three, {"output": "nonsense"}, "output 'nonsense' has no"),
    ],
)
def test_refusals(tmp_path, make, options, message):
    with pytest.raises(ModelLoadError, match=message):
        load(written(make(), tmp_path / "m.onnx"), **options)


def test_an_image_of_scores_squeezed_to_one_map_is_refused_with_its_shape(tmp_path):
    with pytest.raises(ModelLoadError, match=r"\(-1, 64, 64\)"):
        load(written(mask_models.one_squeezed(), tmp_path / "m.onnx"))
