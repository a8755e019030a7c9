"""Networks of Hugging Face's transformers, as they are: objects with logits, found and explained without a wrapper."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    YolosConfig,
    YolosForObjectDetection,
)

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Pixels, Similarity, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.build import build
from heatlens_server.fleet.export import make_export
from loaded_models import noise

PREPROCESS = {"resize_px": 64, "crop_px": 64, "mean": [0.5] * 3, "std": [0.5] * 3}


def vit():
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    return ViTForImageClassification(ViTConfig(image_size=64, patch_size=16, num_labels=5, **options))


def swin():
    options = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return SwinForImageClassification(SwinConfig(image_size=64, patch_size=4, num_labels=5, **options))


def convnext():
    return ConvNextForImageClassification(ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_labels=5))


def dinov2():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2Model(Dinov2Config(image_size=64, patch_size=16, **options))


def segformer():
    widths = {"hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 1, 1, 2], "decoder_hidden_size": 16}
    return SegformerForSemanticSegmentation(SegformerConfig(depths=[1] * 4, num_labels=4, **widths))


def yolos():
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return YolosForObjectDetection(YolosConfig(image_size=[64, 64], num_detection_tokens=5, **options))


class Unwrapped(nn.Module):
    """What people wrote to get around objects: the control."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).logits


@pytest.fixture
def load(monkeypatch):
    """Load what a function makes, always with the same weights."""
    monkeypatch.setitem(sys.modules, "factories", sys.modules[__name__])
    engines = []

    def load(make, **options):
        def factory():
            torch.manual_seed(1)
            return make()

        monkeypatch.setattr(sys.modules[__name__], "factory", factory, raising=False)
        config = ModelConfig(name="m", source="python:factories:factory", preprocess=PREPROCESS, **options)
        engines.append(TorchEngine(load_model(config), device="cpu"))
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("make", [vit, swin, convnext])
def test_a_classifier_is_explained_as_its_logits_are(load, make):
    engine, control = load(make), load(lambda: Unwrapped(make()))
    assert engine.info.task is Task.CLASSIFICATION
    assert engine.info.class_count == 5
    assert [f"network.{layer}" for layer in engine.info.layers] == list(control.info.layers)
    for method in (Method.GRAD_CAM, Method.LAYER_CAM, Method.EIGEN_CAM):
        for one, other in zip(*(explained(one, method) for one in (engine, control)), strict=True):
            assert one.class_ids == other.class_ids
            np.testing.assert_allclose(one.logits, other.logits, atol=1e-6)
            np.testing.assert_allclose(one.maps, other.maps, atol=1e-5)


def explained(engine, method):
    spec = MapSpec(method, engine.info.layers_of(method)[:1], upsample=False)
    return engine.explain(noise(2), [TopK(2)] * 2, spec)


def test_full_grad_of_a_network_with_biases_of_every_shape(load):
    """Swin has tables of position biases and vectors among its biases."""
    engine = load(swin)
    assert Method.FULL_GRAD in engine.info.methods
    for result in explained(engine, Method.FULL_GRAD):
        assert np.isfinite(result.maps).all()
        assert result.scales.min() > 0


def test_a_network_without_a_classifier_is_an_embedding_model(load):
    engine = load(dinov2)
    assert (engine.info.task, engine.info.class_count) == (Task.EMBEDDING, 32)
    assert engine.info.layers
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
    one, other = noise(2)
    (result,) = engine.explain(one[None], [Similarity(other)], spec)
    assert -1 <= result.findings[0].logit < 1
    assert load(dinov2, task="classification").info.task is Task.CLASSIFICATION


def test_a_segmentation_network_of_coarse_logits(load):
    engine = load(segformer, task="segmentation")
    assert (engine.info.task, engine.info.class_count) == (Task.SEGMENTATION, 4)
    spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False, return_mask=True)
    (result,) = engine.explain(noise(1), [Pixels(TopK(1))], spec)
    assert result.mask.shape == (64, 64)
    assert result.findings[0].area == pytest.approx((result.mask == result.class_ids[0]).mean())


def test_a_detector_of_another_interface_is_refused_with_the_way_out(load):
    with pytest.raises(ModelLoadError, match="takes a list of images"):
        load(yolos, task="detection")


@pytest.mark.parametrize(
    ("make", "expected", "engine"),
    [
        (vit, Method.ELEMENT_WISE_GRAD_CAM, "torch"),
        (vit, Method.ELEMENT_WISE_GRAD_CAM, "auto"),
        (convnext, Method.GRAD_CAM, "torch"),
    ],
)
def test_the_default_method_is_the_familys_and_is_said(monkeypatch, tmp_path, make, expected, engine):
    monkeypatch.setitem(sys.modules, "factories", sys.modules[__name__])
    source = f"python:factories:{make.__name__}"
    options = {"name": "m", "source": source, "preprocess": PREPROCESS, "engine": engine}
    built = build(ModelConfig(**options), cache_dir=tmp_path, make=make_export)
    built.engine.close()
    assert built.engine.info.engine_name == {"torch": "torch", "auto": "onnxruntime"}[engine]
    assert built.method is expected
    said = [line for line in built.assumptions if line.startswith("The default method is element-wise-grad-cam")]
    assert len(said) == (expected is not Method.GRAD_CAM)
    chosen = build(ModelConfig(**options, method="grad-cam"), cache_dir=tmp_path, make=make_export)
    chosen.engine.close()
    assert chosen.method is Method.GRAD_CAM
    assert not any("default method" in line for line in chosen.assumptions)
