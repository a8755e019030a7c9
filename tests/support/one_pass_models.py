"""Networks with signals of a trained one's size, and their raw maps, for tests of methods that need one pass."""

import copy
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from heatlens_server.backends.torch.goals.table import task_model
from heatlens_server.backends.torch.network.network import TorchModel
from heatlens_server.backends.torch.passes.table import explain
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds, Target
from heatlens_server.maps.steps.job import at_once
from loaded_models import loaded

PX = 64


@functools.cache
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        net = getattr(torchvision.models, name)(weights=None, num_classes=10).eval()
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.train()
            norm.momentum = None
        net(torch.randn(8, 3, PX, PX))
        head = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
        head.weight.normal_()
        head.bias.normal_()
        # Libraries add 1e-7 to what they divide by: gradients must be large against it.
        size = net.eval()(torch.randn(4, 3, PX, PX)).std()
        head.weight *= 100.0 / size
    return net.eval()


def calibrated(name: str) -> nn.Module:
    """A network of torchvision's with random weights; batch statistics keep its activations from vanishing."""
    return copy.deepcopy(_made(name))


def placed(
    module: nn.Module,
    layers: Sequence[str] = (),
    *,
    px: int | tuple[int, int] = PX,
    precision: str = "fp32",
) -> TorchModel:
    """A checked classifier; with no layers named, those that are found."""
    size = (px, px) if isinstance(px, int) else px
    found = discover(module.eval().requires_grad_(False), size, layers)
    bare = loaded(module, found.layers, class_count=found.class_count)
    bare = dataclasses.replace(
        bare, grids=found.grids, preprocess=dataclasses.replace(bare.preprocess, resize_px=size, crop_px=size)
    )
    model = TorchModel(bare, task_model(bare), device="cpu", precision=precision)
    model.check()
    return model


def raw(
    model: TorchModel, images: np.ndarray, targets: Sequence[Target], method: Method, **options: object
) -> list[Tensor]:
    """The raw maps (N, K, h, w) of each layer; of the model's default layer unless `layers` are named."""
    spec = MapSpec(method, **{"layers": model.model.layers[:1], "upsample": False, **options})
    return at_once(explain(model, model.inputs(images), targets, spec)).raw


def top(model: TorchModel, images: np.ndarray) -> list[ClassIds]:
    """The most and the second most probable class of every image."""
    return [ClassIds(tuple(ids)) for ids in model.run_images(images).topk(2).indices.tolist()]


def stretched(maps: Tensor) -> Tensor:
    """The positive part of maps, min-maxed, as libraries return it."""
    positive = maps.clamp(min=0)
    low, high = positive.amin((-2, -1), keepdim=True), positive.amax((-2, -1), keepdim=True)
    return (positive - low) / (high - low)


def assert_parity(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """Two maps in [0, 1], or of one scale, are the same; the difference is printed."""
    scale = float(expected.abs().amax())
    difference = float((found.double() - expected.double()).abs().amax()) / scale
    print(f"PARITY {what}: {difference:.1e}")
    assert expected.std() > 0.01 * scale
    assert difference <= tolerance, what
