"""Small detectors that return boxes as those of ultralytics and transformers do, before any of them is left out."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_convert, clip_boxes_to_image

PX = 64
CLASSES = 3
STRIDES = (8, 16, 32)
BOXES = sum((PX // stride) ** 2 for stride in STRIDES)


class _Conv(nn.Sequential):
    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(ins, outs, 3, stride, 1), nn.SiLU())


class Neck(nn.Module):
    """Three maps of features: down in a backbone, up, and down again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(_Conv(3, width, 2), _Conv(width, width, 2))
        self.down = nn.ModuleList(_Conv(width, width, 2) for _ in STRIDES)
        self.up = nn.ModuleList(_Conv(2 * width, width) for _ in STRIDES[1:])
        self.again = nn.ModuleList(_Conv(width, width, 2) for _ in STRIDES[1:])
        self.merge = nn.ModuleList(_Conv(2 * width, width) for _ in STRIDES[1:])

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        ways = [maps[-1]]
        for up, finer in zip(self.up, maps[-2::-1], strict=True):
            ways.append(up(torch.cat([F.interpolate(ways[-1], scale_factor=2.0), finer], 1)))
        found = [ways[-1]]
        for again, merge, coarser in zip(self.again, self.merge, ways[-2::-1], strict=True):
            found.append(merge(torch.cat([again(found[-1]), coarser], 1)))
        return found


def _centres(size: int, stride: int) -> Tensor:
    """The centres of a map's places in pixels, (2, places): x, then y."""
    one = (torch.arange(size) + 0.5) * stride
    y, x = torch.meshgrid(one, one, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()])


class YoloV8(nn.Module):
    """(N, 4 + classes, boxes): centre, width and height in pixels, and sigmoids."""

    def __init__(self, extra: int = 0, *, activation: Callable[[Tensor], Tensor] = torch.sigmoid) -> None:
        super().__init__()
        self.neck = Neck()
        self.places = nn.ModuleList(nn.Sequential(_Conv(8, 8), nn.Conv2d(8, 4, 1)) for _ in STRIDES)
        self.classes = nn.ModuleList(nn.Sequential(_Conv(8, 8), nn.Conv2d(8, CLASSES, 1)) for _ in STRIDES)
        self.extra = extra
        self.activation = activation

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4, boxes) and logits (N, classes, boxes)."""
        boxes, logits = [], []
        for place, classes, stride, features in zip(self.places, self.classes, STRIDES, self.neck(x), strict=True):
            before, after = (F.softplus(place(features).flatten(2)) * stride * 2).chunk(2, 1)
            centres = _centres(int(features.shape[2]), stride).to(x)
            corners = centres - before, centres + after
            boxes.append(torch.cat([(corners[0] + corners[1]) / 2, corners[1] - corners[0]], 1))
            logits.append(classes(features).flatten(2))
        return torch.cat(boxes, 2), torch.cat(logits, 2)

    def forward(self, x: Tensor) -> Tensor:
        boxes, logits = self.parts(x)
        further = [boxes[:, :1].expand(-1, self.extra, -1) * 0.1] if self.extra else []
        return torch.cat([boxes, self.activation(logits), *further], 1)


class EndToEnd(nn.Module):
    """(N, boxes, 6): corners, score and class of the best boxes, as ultralytics' detectors without suppression do."""

    def __init__(self, most: int = 30) -> None:
        super().__init__()
        self.inner = YoloV8()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        boxes, logits = self.inner.parts(x)
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1).transpose(1, 2)
        scores = logits.sigmoid().transpose(1, 2)
        rows = scores.amax(-1).topk(self.most)[1][..., None]
        corners = corners.gather(1, rows.expand(-1, -1, 4))
        scores, places = scores.gather(1, rows.expand(-1, -1, CLASSES)).flatten(1).topk(self.most)
        corners = corners.gather(1, (places // CLASSES)[..., None].expand(-1, -1, 4))
        return torch.cat([corners, scores[..., None], (places % CLASSES)[..., None].to(scores)], -1)


class YoloV5(nn.Module):
    """(N, boxes, 5 + classes): centre, width and height in pixels, sigmoids of there being something and of classes."""

    ANCHORS = ((10.0, 14.0), (24.0, 18.0))

    def __init__(self) -> None:
        super().__init__()
        self.neck = Neck()
        self.heads = nn.ModuleList(nn.Conv2d(8, 2 * (5 + CLASSES), 1) for _ in STRIDES)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for head, stride, features in zip(self.heads, STRIDES, self.neck(x), strict=True):
            raw = head(features).reshape(-1, 2, 5 + CLASSES, (PX // stride) ** 2).transpose(2, 3)
            places, sides, scores = raw.sigmoid().split((2, 2, 1 + CLASSES), 3)
            centres = (places * 2 - 1) * stride + _centres(PX // stride, stride).T.to(x)
            sides = (sides * 2) ** 2 * torch.tensor(self.ANCHORS).to(x)[:, None]
            found.append(torch.cat([centres, sides, scores], 3).flatten(1, 2))
        return torch.cat(found, 1)


class Detr(nn.Module):
    """Logits (N, queries, classes + 1) and relative boxes (N, queries, 4): an encoder, and a decoder of queries."""

    def __init__(self, queries: int = 12, *, nothing: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(_Conv(3, 8, 2), _Conv(8, 8, 2), _Conv(8, 16, 2))
        self.places = nn.Parameter(torch.randn((PX // 8) ** 2, 16) * 0.3)
        self.encode = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.queries = nn.Parameter(torch.randn(queries, 16))
        self.decode = nn.MultiheadAttention(16, 2, batch_first=True)
        self.hidden = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
        self.classes = nn.Linear(16, CLASSES + nothing)
        self.corners = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.body(x).flatten(2).transpose(1, 2)
        given = tokens + self.places
        tokens = self.norm(tokens + self.encode(given, given, tokens, need_weights=False)[0])
        queries = self.queries.expand(x.shape[0], -1, -1)
        read = self.decode(queries, tokens + self.places, tokens, need_weights=False)[0]
        found = self.hidden(queries + read)
        return self.classes(found), self.corners(found).sigmoid()


class Corners(nn.Module):
    """Corners (N, boxes, 4) and sigmoids (N, classes, boxes) of a network, as NonMaxSuppression takes them."""

    def __init__(self, order: Sequence[int] = (0, 1, 2, 3), scale: float = 1.0) -> None:
        super().__init__()
        self.inner = YoloV8()
        self.order = list(order)
        self.scale = scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        boxes, logits = self.inner.parts(x)
        centres, sides = boxes.chunk(2, 1)
        corners = torch.cat([centres - sides / 2, centres + sides / 2], 1)[:, self.order] * self.scale
        return corners.transpose(1, 2), logits.sigmoid()


class Listed(nn.Module):
    """The same detector with torchvision's interface: what is left after suppression, best first."""

    def __init__(self, inner: YoloV8, most_overlap: float) -> None:
        super().__init__()
        self.inner = inner
        self.most_overlap = most_overlap

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        boxes, logits = self.inner.parts(torch.stack(list(images)))
        found = []
        for centred, scored in zip(boxes, logits.sigmoid(), strict=True):
            corners = clip_boxes_to_image(box_convert(centred.T, "cxcywh", "xyxy"), images[0].shape[1:])
            scores, labels = scored.max(0)
            kept = batched_nms(corners, scores, labels, self.most_overlap)
            found.append({"boxes": corners[kept], "labels": labels[kept], "scores": scores[kept]})
        return found


def made(make: Callable[[], nn.Module], scale: float = 1.0) -> nn.Module:
    """A network with weights that are always the same, whose boxes and scores differ from place to place.

    Args:
        make: the network.
        scale: what all its weights are multiplied by.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.mul_(scale)
    return module
