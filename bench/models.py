"""The networks and photos that the benchmarks run on."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.config import ModelConfig
from heatlens_server.core.preprocess import PreprocessSpec

INPUT_PX = 224


def efficientnet_lite0() -> LoadedModel:
    """The embedded model, with its trained weights."""
    return load_model(ModelConfig(name="efficientnet_lite0", source="embedded:efficientnet_lite0"))


def resnet50() -> LoadedModel:
    """Random weights: speed does not depend on them."""
    torch.manual_seed(0)
    module: nn.Module = torchvision.models.resnet50().eval().requires_grad_(requires_grad=False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return LoadedModel(
        name="resnet50",
        version="random",
        module=module,
        preprocess=PreprocessSpec(
            resize_px=256, crop_px=(INPUT_PX, INPUT_PX), mean=mean, std=std, interpolation="bilinear"
        ),
        labels=(),
        class_count=1000,
        layers=("layer4",),
    )


def photo_paths() -> list[Path]:
    """Real photos, 451x300 to 640x427 pixels, as JPEG and PNG files."""
    skimage, sklearn = Path(str(files("skimage"))) / "data", Path(str(files("sklearn"))) / "datasets" / "images"
    names = [skimage / "chelsea.png", skimage / "coffee.png", skimage / "rocket.jpg", skimage / "astronaut.png"]
    return [*names, sklearn / "china.jpg", sklearn / "flower.jpg"]


def noise_images(count: int) -> np.ndarray:
    """uint8 (count, 224, 224, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, INPUT_PX, INPUT_PX, 3), dtype=np.uint8)
