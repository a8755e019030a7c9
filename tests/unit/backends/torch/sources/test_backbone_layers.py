"""Layers of networks for segmentation and detection: those of torchvision's, of a U-Net, and those named by hand."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model

from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection, discover_for_segmentation
from heatlens_server.backends.torch.sources.outputs import find_output
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import MAP, Grid, Layout
from heatlens_server.core.tasks import Task
from task_models import DETECTORS, LABELS, PX, Segmenter, lraspp

INPUT = dataclasses.replace(IMAGENET_PREPROCESS, resize_px=PX, crop_px=(PX, PX))


def segmentation(module, size, wanted):
    reading = find_output(module, INPUT, task=Task.SEGMENTATION, is_task_open=False).reading
    return discover_for_segmentation(module, size, wanted, scores=reading.scores, grids={})


class UNet(nn.Module):
    """One level down and up again, with a connection past it."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
        self.bottleneck = nn.Sequential(nn.MaxPool2d(4), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.up = nn.Upsample(scale_factor=4)
        self.head = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.down(x)
        return self.head(torch.cat([fine, self.up(self.bottleneck(fine))], 1))


class Classifier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def made(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize(
    ("make", "layers", "classes"),
    [
        (lraspp, ("backbone.16", "backbone.6", "backbone.3", "backbone.1"), LABELS),
        (
            partial(get_model, "deeplabv3_mobilenet_v3_large", weights=None, weights_backbone=None),
            ("backbone.16", "backbone.6", "backbone.3", "backbone.1"),
            21,
        ),
        (Segmenter, ("backbone", "backbone.1", "backbone.0"), 5),
        (UNet, ("bottleneck", "down"), 3),
    ],
)
def test_segmentation_is_explained_by_the_deepest_features(make, layers, classes):
    found = segmentation(made(make), (PX, PX), ())
    assert (found.layers, found.class_count) == (layers, classes)
    assert set(found.grids.values()) == {MAP}


@pytest.mark.parametrize(
    ("family", "default"),
    [
        ("faster-rcnn", "backbone.body.layer4"),
        ("retinanet", "backbone.body.layer4"),
        # Every level after it is of a part of the detections only.
        ("ssd", "backbone.features.0"),
    ],
)
def test_detection_is_explained_by_what_all_levels_depend_on(family, default):
    module = made(DETECTORS[family])
    found = discover_for_detection(module, (PX, PX), ())
    assert found.layers[0] == default
    assert found.layers[-1] == "backbone"
    assert found.class_count == LABELS
    assert found.grids["backbone"] == Grid(Layout.PYRAMID)
    assert all(found.grids[layer] == MAP for layer in found.layers[:-1])


def test_layers_may_be_named():
    module = made(DETECTORS["faster-rcnn"])
    found = discover_for_detection(module, (PX, PX), ("backbone", "backbone.body.layer2"))
    assert found.grids == {"backbone": Grid(Layout.PYRAMID), "backbone.body.layer2": MAP}
    assert segmentation(made(Segmenter), (PX, PX), ("classifier.1",)).layers == ("classifier.1",)


@pytest.mark.parametrize(
    ("discover", "make", "wanted", "message"),
    [
        (discover_for_detection, DETECTORS["faster-rcnn"], ("backbone.x",), "layers: there is no module 'backbone.x'"),
        (discover_for_detection, DETECTORS["retinanet"], ("head.classification_head.conv",), "must run once"),
        (discover_for_detection, DETECTORS["faster-rcnn"], ("roi_heads.box_head",), "not a feature map"),
        (discover_for_detection, Classifier, (), "fails on a list of one image .*: a detector takes a list"),
        (segmentation, Classifier, (), "must return scores of shape"),
        (segmentation, partial(nn.Conv2d, 3, 5, 1), (), "no layer of the backbone returns a feature map"),
        (segmentation, Segmenter, ("nowhere",), "layers: there is no module 'nowhere'"),
    ],
)
def test_refusals(discover, make, wanted, message):
    with pytest.raises(ModelLoadError, match=message):
        discover(made(make), (PX, PX), wanted)
