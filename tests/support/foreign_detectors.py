"""Detectors with torchvision's interface that are not torchvision's: they find what they can say nothing about."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import FasterRCNN

from task_models import DETECTORS

PADDED_PX = 256


class Boxes(nn.Module):
    """Four boxes in every image, with labels from 1 on; nothing tells how many labels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*list(resnet18(weights=None).children())[:-2])
        self.head = nn.Conv2d(512, 4, 1)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            scores = self.head(self.net(image[None])).sigmoid()[0].flatten(1).amax(1)
            boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0]]).repeat(len(scores), 1)
            found.append({"boxes": boxes, "labels": torch.arange(1, 5), "scores": scores})
        return found


def padding_of(size_px: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height and width that `Letterboxed` scales an image to, and what it pads above and left of it, in pixels."""
    scale = PADDED_PX / max(size_px)
    height, width = (round(side * scale) for side in size_px)
    return height, width, (PADDED_PX - height) // 2, (PADDED_PX - width) // 2


def letterboxed(image: Tensor) -> Tensor:
    """An image (3, H, W), scaled and padded with gray to a square."""
    height, width, top, left = padding_of((image.shape[1], image.shape[2]))
    small = F.interpolate(image[None], size=(height, width), mode="bilinear")[0]
    return F.pad(small, (left, PADDED_PX - width - left, top, PADDED_PX - height - top), value=0.5)


class Letterboxed(Boxes):
    """Pads images to squares itself, as many wrappers of YOLO do."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return super().forward([letterboxed(image) for image in images])


class Cropped(Boxes):
    """Sees the middle of an image alone."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return super().forward([image[:, 32:-32, 16:-16] for image in images])


class Wrapped(nn.Module):
    """A detector of torchvision's inside another module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.inner(images)


def _made(kind: type[Boxes]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def boxes() -> nn.Module:
    return _made(Boxes)


def padded() -> nn.Module:
    return _made(Letterboxed)


def cropped() -> nn.Module:
    return _made(Cropped)


def wrapped() -> nn.Module:
    """torchvision's Faster R-CNN, whose transform is out of sight."""
    inner = DETECTORS["faster-rcnn"]()
    assert isinstance(inner, FasterRCNN)
    return Wrapped(inner).eval()
