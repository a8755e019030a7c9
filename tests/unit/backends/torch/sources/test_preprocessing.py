"""How images become a network's input: what is found, what is assumed and said, and what overrides it."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.preprocessing import find_channels, resolve_preprocess
from heatlens_server.config import IMAGENET_PREPROCESS, ModelConfig, PreprocessConfig
from heatlens_server.core.errors import ModelLoadError


def gray():
    net = torchvision.models.resnet18(weights=None, num_classes=2)
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return net


def four():
    return timm.create_model("resnet18", pretrained=False, in_chans=4, num_classes=2)


class HeadFirst(nn.Module):
    """Registers a convolution of 8 channels before the one of 2 that runs first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 5, 1)
        self.body = nn.Conv2d(2, 8, 3, 2, 1)

    def forward(self, x):
        return self.head(self.body(x)).mean((2, 3))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo", sys.modules[__name__])


def load(factory, **preprocess):
    return load_model(ModelConfig(name="m", source=f"python:zoo:{factory}", preprocess=preprocess))


@pytest.mark.parametrize(("factory", "channels", "words"), [("gray", 1, "images become gray"), ("four", 4, "alpha")])
def test_channels_are_found_from_the_first_convolution_and_said(factory, channels, words):
    model = load(factory)
    assert model.preprocess.channels == channels
    (found,) = [one for one in model.assumptions if f"takes {channels} channel" in one]
    assert words in found
    assert "[models.preprocess] channels" in found
    assert model.layers[0] == "layer4"
    with torch.no_grad():
        assert model.module(torch.zeros(1, channels, 224, 224)).shape == (1, 2)


def test_channels_of_a_convolution_that_is_registered_late():
    assert find_channels(HeadFirst().eval(), (32, 32), 3) == 2


def test_three_channels_are_not_worth_a_word():
    assert not any("channels" in one for one in load("usual").assumptions)


def usual():
    return torchvision.models.resnet18(weights=None, num_classes=2)


def test_mean_and_std_of_gray_are_those_of_luma_and_said():
    model = load("gray")
    assert model.preprocess.mean == (0.459,)
    assert model.preprocess.std == (0.226,)
    (said,) = [one for one in model.assumptions if "mean and std" in one]
    assert "mean = [0.459]" in said
    luma = np.array([0.299, 0.587, 0.114])
    assert np.dot(luma, IMAGENET_PREPROCESS.mean) == pytest.approx(0.459, abs=5e-4)


def test_mean_and_std_that_are_configured_are_not_assumed():
    model = load("gray", mean=[0.5], std=[0.25])
    assert (model.preprocess.mean, model.preprocess.std) == ((0.5,), (0.25,))
    assert not any("mean and std" in one for one in model.assumptions)


@pytest.mark.parametrize(
    ("changes", "channels", "mean"),
    [
        ({"mean": [0.5], "std": [0.5]}, 3, (0.5, 0.5, 0.5)),
        ({"channels": 2, "mean": [0.1, 0.2], "std": [0.5]}, 2, (0.1, 0.2)),
        ({"mean": [0.1] * 5, "std": [0.5] * 5}, 5, (0.1,) * 5),
        ({"channels": 4}, 4, (*IMAGENET_PREPROCESS.mean, 0.449)),
        ({"channels": 2}, 2, (0.449, 0.449)),
    ],
)
def test_channels_and_values_by_configuration(changes, channels, mean):
    spec = resolve_preprocess(IMAGENET_PREPROCESS, PreprocessConfig(**changes)).spec
    assert (spec.channels, spec.mean) == (channels, mean)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1, "mean": [0.1, 0.2, 0.3]}, "mean has 3 values, for 1 channels"),
        ({"mean": [0.1, 0.2], "std": [0.1, 0.2, 0.3]}, "mean has 2 values, for 3 channels"),
    ],
)
def test_values_that_do_not_fit_the_channels(changes, message):
    with pytest.raises(ModelLoadError, match=f"preprocess: {message}"):
        resolve_preprocess(IMAGENET_PREPROCESS, PreprocessConfig(**changes))


def test_a_window_of_the_configuration():
    by_values = resolve_preprocess(IMAGENET_PREPROCESS, PreprocessConfig(window=[-160, 240])).spec
    assert (by_values.window, by_values.window_auto) == ((-160.0, 240.0), False)
    by_image = resolve_preprocess(IMAGENET_PREPROCESS, PreprocessConfig(window="auto")).spec
    assert (by_image.window, by_image.window_auto) == (None, True)


class Cifar(nn.Module):
    """Trained on images of 32 pixels in [-1, 1]; its factory does not say so."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def cifar():
    return Cifar()


def of_timm():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=4)


def of_timm_at_another_size():
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=4, img_size=96)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("resnet18", pretrained=False, num_classes=4)

    def forward(self, x):
        return self.net(x)


def of_timm_inside():
    return Wrapped()


def of_transformers():
    """As a classifier of transformers tells its size."""
    network = Cifar()
    network.config = SimpleNamespace(image_size=48, num_channels=3)
    return network


VALUES = "mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225]"


def test_imagenets_values_are_said_where_nobody_tells():
    (said,) = [one for one in load("cifar").assumptions if "Nothing tells" in one]
    for words in ("resize_px = 256, crop_px = [224, 224]", VALUES, 'interpolation = "bilinear"', "as for ImageNet"):
        assert words in said
    assert "set in [models.preprocess]" in said


def test_only_what_is_not_configured_is_said():
    model = load("cifar", resize_px=[32, 32], crop_px=[32, 32])
    (said,) = [one for one in model.assumptions if "Nothing tells" in one]
    assert VALUES in said
    assert "crop_px" not in said
    right = load("cifar", resize_px=[32, 32], crop_px=[32, 32], mean=[0.5], std=[0.5])
    assert not any("Nothing tells" in one for one in right.assumptions)
    assert right.preprocess.crop_px == (32, 32)
    assert (right.preprocess.mean, right.preprocess.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("factory", "resize_px", "crop_px", "mean"),
    [
        ("of_timm", 248, (224, 224), (0.5, 0.5, 0.5)),
        ("of_timm_at_another_size", 106, (96, 96), (0.5, 0.5, 0.5)),
        ("of_timm_inside", 235, (224, 224), (0.485, 0.456, 0.406)),
    ],
)
def test_timms_own_values_are_taken(factory, resize_px, crop_px, mean):
    model = load(factory)
    assert (model.preprocess.resize_px, model.preprocess.crop_px) == (resize_px, crop_px)
    assert model.preprocess.mean == mean
    assert model.preprocess.interpolation == "bicubic"
    (said,) = [one for one in model.assumptions if "The network's pretrained_cfg gives" in one]
    assert f"crop_px = {list(crop_px)}" in said
    assert not any("Nothing tells" in one for one in model.assumptions)


def test_the_size_that_a_configuration_of_transformers_tells_is_taken_and_the_rest_assumed():
    model = load("of_transformers")
    assert (model.preprocess.resize_px, model.preprocess.crop_px) == ((48, 48), (48, 48))
    (taken,) = [one for one in model.assumptions if "The network's config.image_size gives" in one]
    assert "crop_px = [48, 48]" in taken
    (assumed,) = [one for one in model.assumptions if "Nothing tells" in one]
    assert VALUES in assumed
    assert "crop_px" not in assumed


def test_what_a_source_tells_is_no_assumption():
    config = ModelConfig(name="m", source="torchvision:resnet18", weights="none")
    assert not any("preprocess" in one for one in load_model(config).assumptions)
