"""Small random networks for segmentation, detection and embedding, of torchvision's kinds."""

import copy
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from skimage import data
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection, discover_for_segmentation
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.backends.torch.sources.source import DETECTION_PREPROCESS
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.tasks import Task
from random_heads import calibrate_heads

LABELS = 7
PX = 96

_SIZES = {"min_size": PX, "max_size": 2 * PX}


class Body(nn.Sequential):
    """Four stages of one convolution each, behind a stem: 48, 24, 12, 6 and 3 pixels wide."""

    widths = (8, 8, 12, 16, 24)

    def __init__(self) -> None:
        names, ins = ("stem", "layer1", "layer2", "layer3", "layer4"), (3, *self.widths)
        super().__init__(
            OrderedDict(
                (name, nn.Sequential(nn.Conv2d(ins[i], ins[i + 1], 3, stride=2, padding=1), nn.ReLU(inplace=True)))
                for i, name in enumerate(names)
            )
        )


def _pyramid(channels: int, extra: nn.Module | None = None) -> nn.Module:
    returned = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(Body(), returned, list(Body.widths[2:]), channels, extra_blocks=extra)


def _faster_rcnn() -> nn.Module:
    anchors = AnchorGenerator(((16,), (32,), (48,), (64,)), ((0.5, 1.0, 2.0),) * 4)
    return FasterRCNN(
        _pyramid(8),
        rpn_anchor_generator=anchors,
        rpn_post_nms_top_n_test=60,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(8 * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, LABELS),
        **_SIZES,
    )


def _retinanet() -> nn.Module:
    return RetinaNet(_pyramid(16, LastLevelP6P7(16, 16)), LABELS, detections_per_img=30, **_SIZES)


def _fcos() -> nn.Module:
    return FCOS(_pyramid(64, LastLevelP6P7(64, 64)), LABELS, detections_per_img=30, **_SIZES)


def _ssd() -> nn.Module:
    return get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=LABELS)


DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster-rcnn": _faster_rcnn,
    "retinanet": _retinanet,
    "fcos": _fcos,
    "ssd": _ssd,
}


@cache
def _made(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval().requires_grad_(False)
    if make is not Embedder:
        calibrate_heads(module)
    return module


@cache
def _found(name: str) -> tuple[tuple[str, ...], dict]:
    found = discover_for_detection(_made(DETECTORS[name]), (PX, PX), ())
    assert found.class_count == LABELS
    return found.layers, dict(found.grids)


def detector(name: str) -> LoadedModel:
    """One of DETECTORS, as `load_model` returns it; a module of its own."""
    layers, grids = _found(name)
    return LoadedModel(
        name=name,
        version="0",
        module=copy.deepcopy(_made(DETECTORS[name])),
        preprocess=DETECTION_PREPROCESS,
        labels=(),
        class_count=LABELS,
        layers=layers,
        task=Task.DETECTION,
        grids=grids,
    )


class Segmenter(nn.Module):
    """A backbone and a head, whose scores are a tensor of a quarter of the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(Body())[:3])
        self.classifier = nn.Sequential(
            nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Identity(), nn.Conv2d(16, 5, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.backbone(x))


def lraspp() -> nn.Module:
    return get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=LABELS)


def segmenter(make: Callable[[], nn.Module] = Segmenter) -> LoadedModel:
    """A network for segmentation, as `load_model` returns it; a module of its own."""
    module = copy.deepcopy(_made(make))
    reading = OutputReading("out" if make is lraspp else None, of_pixels=True)
    found = discover_for_segmentation(module, (PX, PX), (), scores=reading.scores, grids={})
    return LoadedModel(
        name="segmenter",
        version="0",
        module=module,
        preprocess=dataclasses.replace(IMAGENET_PREPROCESS, resize_px=None, crop_px=None),
        labels=(),
        class_count=found.class_count,
        layers=found.layers,
        task=Task.SEGMENTATION,
        grids=found.grids,
        reading=reading,
    )


class Embedder(nn.Module):
    """As many elements as the last map has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


def embedder() -> LoadedModel:
    """An embedding model, as `load_model` returns it; a module of its own."""
    module = copy.deepcopy(_made(Embedder))
    found = discover(module, (PX, PX), scored=False)
    return LoadedModel(
        name="embedder",
        version="0",
        module=module,
        preprocess=dataclasses.replace(IMAGENET_PREPROCESS, resize_px=PX, crop_px=(PX, PX)),
        labels=(),
        class_count=found.class_count,
        layers=found.layers,
        task=Task.EMBEDDING,
        grids=found.grids,
    )


@cache
def _pictures() -> tuple[np.ndarray, ...]:
    return data.chelsea(), data.coffee(), data.rocket()


def photos(height_px: int = PX, width_px: int = PX) -> np.ndarray:
    """Three different parts of photos, uint8 (3, H, W, 3)."""
    cat, coffee, rocket = _pictures()
    parts = [cat[60:, 80:], coffee[60:, 150:], rocket[40:, 220:]]
    return np.stack([part[: 2 * height_px : 2, : 2 * width_px : 2] for part in parts])


def recorded(module: nn.Module, layer: str, inputs: object) -> tuple[torch.Tensor, object]:
    """Run a network with a hook of the test's own: a layer's output as a leaf, and what the network returns."""
    kept: list[torch.Tensor] = []

    def hook(_module: nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    handle = module.get_submodule(layer).register_forward_hook(hook)
    output = module(inputs)
    handle.remove()
    return kept[0], output


def by_hand(method: Method, activations: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    """relu(raw map), (h, w), of one image: Grad-CAM or HiResCAM, written out."""
    if method is Method.GRAD_CAM:
        gradient = gradient.mean((2, 3), keepdim=True)
    return (gradient * activations).sum(1).relu()[0].detach().numpy()


def raw(result: ImageResult, k: int) -> Float32Array:
    """relu(raw map), (h, w)."""
    return result.maps[k] * result.scales[k] + result.offsets[k]
