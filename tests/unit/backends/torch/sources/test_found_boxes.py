"""Detectors that are not torchvision's: their layers, and what is refused with the interface to write."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import foreign_detectors
from foreign_detectors import Boxes
from heatlens_server.backends.torch.sources.backbone_layers import discover_for_detection
from heatlens_server.backends.torch.sources.found_boxes import check_found, detect
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import MAP, Grid, Layout

PX = 64
FOUND = {"boxes": torch.zeros(2, 4), "labels": torch.tensor([1, 2]), "scores": torch.zeros(2)}


def discover(module, wanted=()):
    return discover_for_detection(module.eval().requires_grad_(False), (PX, PX), wanted)


class TwoHeads(nn.Module):
    """Boxes and scores of the cells of one map, by heads with hidden layers; some boxes are below a threshold."""

    def __init__(self, bias: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.early = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU())
        self.trunk = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.scores = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 1, 1))
        self.sizes = nn.Sequential(nn.Conv2d(8, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))
        nn.init.constant_(self.scores[2].bias, bias)

    def forward(self, images):
        features = self.trunk(self.early(torch.stack(images)))
        found = []
        for scores, sizes in zip(self.scores(features).sigmoid(), self.sizes(features), strict=True):
            kept = scores.flatten() > 0.4
            boxes = sizes.flatten(1).T[kept]
            found.append({"boxes": boxes, "labels": kept[kept].long(), "scores": scores.flatten()[kept]})
        return found


def test_the_last_map_that_all_boxes_depend_on():
    found = discover(foreign_detectors.boxes())
    assert found.layers[:2] == ("net", "net.6")
    assert set(found.grids.values()) == {MAP}
    assert found.class_count == 0
    assert "'net' is explained" in found.assumptions[0]


def test_not_the_scores_themselves():
    # Of the heads the last hidden layer that scores depend on; what comes after it no layer reads.
    found = discover(TwoHeads())
    assert found.layers[0] == "scores.1"


def test_the_backbone_of_a_wrapped_detector():
    found = discover(foreign_detectors.wrapped())
    assert (found.layers[0], found.layers[-1]) == ("inner.backbone.body.layer4", "inner.backbone")
    assert found.grids["inner.backbone"] == Grid(Layout.PYRAMID)
    assert (found.class_count, found.assumptions) == (7, ())
    named = discover(foreign_detectors.wrapped(), ("inner.backbone",))
    assert named.grids == {"inner.backbone": Grid(Layout.PYRAMID)}


class Placed(TwoHeads):
    """Adds an embedding of places, the same for every image, after all feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Conv2d(2, 8, 1)
        self.read = nn.Conv2d(8, 1, 1)

    def forward(self, images):
        features = self.trunk(self.early(torch.stack(images)))
        places = self.places(torch.ones(1, 2, *features.shape[2:]))
        scores = self.read(features + places).sigmoid().flatten(1)
        boxes = torch.ones(scores.shape[1], 4)
        return [{"boxes": boxes, "labels": torch.ones_like(one).long(), "scores": one} for one in scores]


def test_what_is_the_same_for_all_images_is_not_explained():
    assert discover(Placed()).layers[0] == "trunk"


def test_a_detector_that_finds_nothing_must_be_told_its_layer():
    with pytest.raises(ModelLoadError, match="finds none in a photo and in noise: name it in `layers`"):
        discover(TwoHeads(bias=-20.0))
    assert discover(TwoHeads(bias=-20.0), ("trunk",)).layers == ("trunk",)


class Functional(Boxes):
    """Has no layer in common but its last one."""

    def forward(self, images):
        scores = self.head.weight.sum() * torch.stack(images).mean((1, 2, 3)).sigmoid()
        return [{"boxes": torch.ones(1, 4), "labels": torch.ones(1).long(), "scores": one[None]} for one in scores]


def test_no_layer_in_common():
    with pytest.raises(ModelLoadError, match=r"no feature map .* in common: name one in `layers`"):
        discover(Functional())


class Transformer(nn.Module):
    """As in transformers: takes a tensor, and returns an object with logits and boxes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.layer(pixel_values), pred_boxes=torch.zeros(1, 100, 4))


class Returning(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)
        self.output = output

    def forward(self, images):
        return self.output


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Transformer(), r"fails on a list of one image \(3, 64, 64\) \(TypeError\): a detector takes a list"),
        (Returning(SimpleNamespace(logits=1)), "returns SimpleNamespace: a detector takes a list of images"),
        (Returning(torch.zeros(1, 5)), r"returns a tensor of shape \(1, 5\): a detector"),
        (Returning((torch.zeros(1, 100, 4), torch.zeros(1, 100))), "returns a tuple of Tensor: a detector"),
        (Returning([{"boxes": torch.zeros(2, 4)}]), r"mappings \(boxes: float32 \(2, 4\)\): a detector"),
        (Returning([{**FOUND, "labels": torch.zeros(2)}]), r"labels: float32 \(2,\), scores: float32 \(2,\)\): a det"),
        (Returning([{**FOUND, "scores": torch.zeros(3)}]), r"scores: float32 \(3,\)\): a detector"),
        (Returning([FOUND, FOUND]), "returns 2 results for one image: a detector"),
    ],
)
def test_the_interface_is_told(module, message):
    with pytest.raises(ModelLoadError, match=message) as caught:
        detect(module, torch.zeros(3, PX, PX))
    assert str(caught.value).endswith("docs/tasks.md has a wrapper for others")


def test_what_fits():
    assert check_found([FOUND]) == [FOUND]
    assert detect(Returning((FOUND,)), torch.zeros(3, PX, PX)) is FOUND
    assert check_found([]) == []
