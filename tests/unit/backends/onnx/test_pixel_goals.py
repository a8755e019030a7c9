"""Classes over pixels by a file: what the torch engine says of the same network, and what autograd does in float64."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mask_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.pixel_goals import PixelGoals
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import ClassIds, Pixels, TopK
from heatlens_server.core.tasks import Task
from onnx_files import write_onnx
from task_models import PX, photos, segmenter

MAP_TOLERANCE = 1e-4


def engine_of(module, path, layers=(), **options):
    write_onnx(module, path, shape=(1, 3, PX, PX), layers=layers)
    preprocess = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    config = ModelConfig(
        name="m", source=f"onnx:{path}", output="logits", layers=layers, preprocess=preprocess, **options
    )
    return NetworkEngine(load_file(path, config), device="cpu", threads=1)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The torch engine of a network whose scores are of half the image's size, and the engine of its file."""
    model = segmenter()
    engine = engine_of(model.module, tmp_path_factory.mktemp("file") / "m.onnx", model.layers)
    torch_engine = TorchEngine(model, device="cpu")
    yield engine, torch_engine
    torch_engine.close()


def part():
    mask = np.zeros((PX, PX), bool)
    mask[10:60, 20:70] = True
    return mask


def assert_same(mine, theirs):
    """The same classes, pixels, figures and maps."""
    assert mine.class_ids == theirs.class_ids
    np.testing.assert_allclose(mine.maps, theirs.maps, atol=MAP_TOLERANCE)
    np.testing.assert_allclose(mine.scales, theirs.scales, rtol=1e-4)
    for one, other in zip(mine.findings, theirs.findings, strict=True):
        figures = [(finding.logit, finding.probability, finding.area) for finding in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5)
    for one, other in ((mine.mask, theirs.mask), (mine.masks, theirs.masks)):
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("score", Score)
@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.HI_RES_CAM])
def test_a_file_says_what_torch_says(both, method, score):
    engine, torch_engine = both
    spec = MapSpec(method, torch_engine.info.layers[:2], upsample=True, score=score, return_mask=True)
    targets = [Pixels(TopK(3)), Pixels(ClassIds((3, 1)), part()), Pixels(TopK(2), part())]
    results = engine.explain(photos(), targets, spec), torch_engine.explain(photos(), targets, spec)
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)
        assert mine.maps.any()


def run(engine, spec, target):
    steps = engine.steps(photos()[0], target, spec, rows=16)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("score", Score)
def test_steps_and_measures_say_what_torch_says(both, score):
    engine, torch_engine = both
    metrics = (Metric.DELETION, Metric.INSERTION, Metric.AVERAGE_DROP, Metric.SPARSENESS)
    layers = torch_engine.info.layers[:1]
    for method in (Method.SCORE_CAM, Method.RECIPRO_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS):
        spec = MapSpec(method, layers, upsample=True, score=score, metrics=metrics, return_mask=True)
        mine, theirs = (run(one, spec, Pixels(TopK(2))) for one in (engine, torch_engine))
        assert_same(mine, theirs)
        assert mine.maps.any()
        for one, other in zip(mine.faithfulness, theirs.faithfulness, strict=True):
            assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("name", ["one", "three"])
def test_classes_that_overlap(tmp_path, name):
    module = getattr(mask_models, name)()
    engine = engine_of(module, tmp_path / "m.onnx", ("bottom",), activation="sigmoid", threshold=0.4)
    own = {"layers": ("bottom",), "class_count": engine.info.class_count, "grids": {}, "threshold": 0.4}
    model = dataclasses.replace(segmenter(), module=module, **own)
    torch_engine = TorchEngine(model, device="cpu")
    assert engine.info.threshold == 0.4
    for score in (Score.LOGIT, Score.LOG_PROBABILITY):
        spec = MapSpec(Method.LAYER_CAM, ("bottom",), upsample=False, score=score, return_mask=True)
        targets = [Pixels(TopK(2 if name == "three" else 1))] * 3
        results = engine.explain(photos(), targets, spec), torch_engine.explain(photos(), targets, spec)
        for mine, theirs in zip(*results, strict=True):
            assert_same(mine, theirs)
    torch_engine.close()


def test_masks_are_there_if_they_are_asked_for(both):
    engine, _ = both
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    assert engine.can(dataclasses.replace(spec, return_mask=True))
    (result,) = engine.explain(photos()[:1], [Pixels(TopK(1))], spec)
    assert result.mask is None


def test_a_class_that_is_nowhere_has_a_flat_map(both):
    engine, _ = both
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    (found,) = engine.explain(photos()[:1], [Pixels(TopK(5))], spec)
    (absent, *_) = set(range(5)) - set(found.class_ids)
    (result,) = engine.explain(photos()[:1], [Pixels(ClassIds((absent, found.class_ids[0])))], spec)
    assert not result.maps[0].any()
    assert result.findings[0].area == 0
    assert result.maps[1].any()


def test_if_no_class_is_predicted_the_closest_one_is_explained():
    logits = np.full((1, 3, 4, 4), -3, np.float32)
    logits[0, 1, 2, 2] = -1
    goals = PixelGoals({"x": logits}, [Pixels(TopK(2))], score=Score.LOGIT, threshold=0.5)
    assert not goals.seed(0)["x"].any()
    result = goals.result(0, np.zeros((1, 4, 4), np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32))
    assert result.class_ids == (1,)
    assert result.findings[0].area == 0


def test_targets_of_other_tasks_are_refused():
    with pytest.raises(TypeError, match="explains pixels"):
        PixelGoals({"x": np.zeros((1, 2, 4, 4), np.float32)}, [TopK(1)], score=Score.LOGIT, threshold=None)


class DeepLab(nn.Module):
    """Features of an eighth of the image's size, dilated branches and a pooled one, and scores that are enlarged."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            *(layer for ins, outs in ((3, 8), (8, 12), (12, 16)) for layer in self._block(ins, outs, stride=2))
        )
        self.branches = nn.ModuleList(nn.Sequential(*self._block(16, 8, dilation=d)) for d in (1, 2, 4))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU())
        self.project = nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU())
        self.classes = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(ins, outs, stride=1, dilation=1):
        conv = nn.Conv2d(ins, outs, 3, stride, dilation, dilation, bias=False)
        return conv, nn.BatchNorm2d(outs), nn.ReLU()

    def forward(self, x):
        features = self.backbone(x)
        pooled = F.interpolate(self.pooled(features), size=features.shape[2:], mode="bilinear")
        joined = torch.cat([*(branch(features) for branch in self.branches), pooled], 1)
        return F.interpolate(self.classes(self.project(joined)), size=x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("opset", [11, 17])
def test_maps_of_a_deeplab_agree_with_float64(tmp_path, opset):
    torch.manual_seed(0)
    module = DeepLab().eval()
    with torch.no_grad():
        module.classes.weight.mul_(10)
    path = write_onnx(module, tmp_path / "m.onnx", shape=(1, 3, PX, PX), layers=("project", "backbone"), opset=opset)
    preprocess = {"mean": [0.0], "std": [1.0]}
    config = ModelConfig(name="m", source=f"onnx:{path}", output="logits", preprocess=preprocess)
    loaded = load_file(path, config)
    assert (loaded.info.task, loaded.info.class_count) == (Task.SEGMENTATION, 4)
    default = loaded.info.layers[0]
    assert (default.name, default.channels, default.height) == ("project", 16, PX // 8)
    named = config.model_copy(update={"layers": ("project", "backbone")})
    engine = NetworkEngine(load_file(path, named), device="cpu", threads=1)
    (image,) = photos()[:1]
    exact, kept = module.double(), {}
    for layer in ("project", "backbone"):
        exact.get_submodule(layer).register_forward_hook(
            lambda _module, _given, output, layer=layer: kept.__setitem__(layer, output)
        )
    logits = exact(torch.from_numpy(image / 255.0).permute(2, 0, 1)[None])[0]
    for layer, activations in kept.items():
        spec = MapSpec(Method.HI_RES_CAM, (layer,), upsample=False)
        (result,) = engine.explain(image[None], [Pixels(ClassIds((0, 1, 2, 3)), part())], spec)
        largest = 0.0
        for k in range(4):
            total = logits[k][torch.from_numpy(part())].sum()
            (gradient,) = torch.autograd.grad(total, activations, retain_graph=True)
            raw = (gradient * activations).sum(1)[0].detach().numpy()
            mine = result.maps[k] * result.scales[k] + result.offsets[k]
            np.testing.assert_allclose(mine, np.maximum(raw, 0), atol=1e-4 * np.abs(raw).max())
            largest = max(largest, raw.max())
        assert largest > 0
