"""Networks that take sides of certain multiples only: images are padded, and masks and maps are of the image alone."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.preprocessing import find_multiple
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.geometry import PixelBox, place_map
from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.targets import ClassIds, Pixels
from heatlens_server.imaging.preprocess import normalise
from task_models import photos


def _block(ins, outs):
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.ReLU())


class UNet(nn.Module):
    """Skip connections: sides that do not divide by 4 raise in torch.cat, as in segmentation_models_pytorch."""

    def __init__(self, classes=3):
        super().__init__()
        self.a, self.b, self.bottom, self.pool = _block(3, 8), _block(8, 16), _block(16, 32), nn.MaxPool2d(2)
        self.up2, self.d2 = nn.ConvTranspose2d(32, 16, 2, 2), _block(32, 16)
        self.up1, self.d1 = nn.ConvTranspose2d(16, 8, 2, 2), _block(16, 8)
        self.head = nn.Conv2d(8, classes, 1)

    def forward(self, x):
        a = self.a(x)
        b = self.b(self.pool(a))
        y = self.d2(torch.cat([self.up2(self.bottom(self.pool(b))), b], 1))
        return self.head(self.d1(torch.cat([self.up1(y), a], 1)))


class OneSize(nn.Module):
    """As a transformer with position embeddings of one size."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 2, 1)
        self.positions = nn.Parameter(torch.zeros(1, 4, 64, 64))

    def forward(self, x):
        return self.head(self.body(x) + self.positions)


def unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet()


def one_size():
    return OneSize()


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo", sys.modules[__name__])


def load(factory="unet", **preprocess):
    return load_model(ModelConfig(name="m", source=f"python:zoo:{factory}", task="segmentation", preprocess=preprocess))


@pytest.fixture
def engine():
    engine = TorchEngine(load(), device="cpu")
    yield engine
    engine.close()


def test_the_multiple_is_found_and_said():
    model = load()
    assert model.preprocess.pad_to_multiple == 4
    (said,) = [one for one in model.assumptions if "multiples of 4 px" in one]
    assert "[models.preprocess] pad_to_multiple overrides that" in said


@pytest.mark.parametrize("preprocess", [{"pad_to_multiple": 8}, {"resize_px": [64, 96], "crop_px": [64, 96]}])
def test_what_is_configured_is_not_searched(preprocess):
    model = load(**preprocess)
    assert model.preprocess.pad_to_multiple == preprocess.get("pad_to_multiple", 1)
    assert not any("multiples" in one for one in model.assumptions)


@pytest.mark.parametrize(("depth", "multiple"), [(0, 1), (1, 2), (5, 32)])
def test_multiples_of_networks_of_any_depth(depth, multiple):
    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            down = x
            for _ in range(depth):
                down = nn.functional.max_pool2d(down, 2)
            up = nn.functional.interpolate(down, scale_factor=2**depth)
            return self.body(up + x)

    assert find_multiple(Strict().eval(), (256, 256), 3) == multiple


def test_a_network_of_one_size_is_refused_with_the_key():
    with pytest.raises(ModelLoadError, match=r"preprocess: .*set crop_px, and resize_px, .* such as \[256, 256\]"):
        load("one_size")
    assert load("one_size", crop_px=[256, 256], resize_px=[256, 256]).preprocess.pad_to_multiple == 1


@pytest.mark.parametrize(("height_px", "width_px"), [(45, 62), (64, 61), (64, 96)])
def test_masks_and_maps_are_those_of_the_padded_image_cut_back(engine, height_px, width_px):
    image = photos(height_px, width_px)[0]
    padded = np.pad(image, ((0, -height_px % 4), (0, -width_px % 4), (0, 0)), mode="edge")
    network = unet().eval()
    layer = network.get_submodule(engine.info.layers[0])
    kept = []
    layer.register_forward_hook(lambda _m, _i, output: (kept.append(output), output.clone())[1])
    inputs = torch.from_numpy(normalise(padded, load().preprocess))[None]
    logits = network(inputs)[0, :, :height_px, :width_px]
    predicted = logits.argmax(0)
    class_id = int(torch.bincount(predicted.flatten(), minlength=3).argmax())
    (gradient,) = torch.autograd.grad(logits[class_id][predicted == class_id].sum(), kept)
    raw = (gradient.mean((2, 3), keepdim=True) * kept[0]).sum(1)[0].detach().numpy()

    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False, return_mask=True)
    (result,) = engine.explain(image[None], [Pixels(ClassIds((class_id,)))], spec)
    np.testing.assert_array_equal(result.mask, predicted.numpy())
    assert result.findings[0].area == pytest.approx(float((predicted == class_id).float().mean()))
    found = result.maps[0] * result.scales[0] + result.offsets[0]
    # The padded map, read at the places of the image: bilinear, as maps are everywhere.
    rows, columns = (
        round(side * part / whole)
        for side, part, whole in zip(raw.shape, image.shape[:2], padded.shape[:2], strict=True)
    )
    whole = PixelBox(0, 0, columns * padded.shape[1] / width_px, rows * padded.shape[0] / height_px)
    expected = np.maximum(place_map(raw, whole, (columns, rows)), 0.0)
    assert expected.max() > 0
    np.testing.assert_allclose(found, expected, atol=1e-5 * expected.max())


@pytest.mark.parametrize(
    "method", [Method.FULL_GRAD, Method.GUIDED_GRAD_CAM, Method.SCORE_CAM, Method.ABLATION_CAM, Method.LAYER_CAM]
)
def test_every_kind_of_method_covers_the_image(engine, method):
    image = photos(45, 62)[0]
    spec = MapSpec(method, engine.info.layers[:1], upsample=True)
    target = Pixels(ClassIds((0,)))
    result = run_to_the_end(engine, image, target, spec)
    assert result.maps.shape == (1, 45, 62)
    assert np.isfinite(result.maps).all()


def test_measures_of_faithfulness_change_the_image_alone(engine):
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False, metrics=(Metric.DELETION, Metric.ROAD_MORF))
    result = run_to_the_end(engine, photos(45, 62)[0], Pixels(ClassIds((0,))), spec)
    assert set(result.faithfulness[0]) == {Metric.DELETION, Metric.ROAD_MORF}


def run_to_the_end(engine, image, target, spec):
    if not spec.in_steps:
        return engine.explain(image[None], [target], spec)[0]
    steps = engine.steps(image, target, spec, rows=4)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
