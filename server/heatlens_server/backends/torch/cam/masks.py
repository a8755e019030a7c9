"""What methods of many runs change: masks over the image, channels taken out of a layer, places left alone in it."""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.backends.torch.cam.grid import Grid, LayerOutput, Layout, from_map, to_map
from heatlens_server.backends.torch.cam.saliency import upsample
from heatlens_server.maps.precision import at_least_float32

_NEIGHBOURHOOD = ((0.0625, 0.125, 0.0625), (0.125, 0.25, 0.125), (0.0625, 0.125, 0.0625))
"""The 3x3 Gaussian of Recipro-CAM and ViT-Recipro-CAM. Beyond the edge is nothing, and nothing makes up for that."""


def constant_channels(features: Tensor) -> Tensor:
    """Which channels have one value everywhere: they say nothing about places.

    Args:
        features: (1, C, h, w).

    Returns:
        bool (C,).
    """
    return (features.amax(dim=(-2, -1)) == features.amin(dim=(-2, -1)))[0]


def channel_masks(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Every channel as a mask over the image: upsampled, then stretched to [0, 1].

    Wang et al. 2020, https://arxiv.org/abs/1910.01279, equations 5 and 6, upsampled with half-pixel centres as in the
    authors' code (and `torch-cam`; the `grad-cam` package aligns corners instead). The mask of a constant channel,
    0 / 0 in the paper, is zero: found before the upsampling, whose rounding would else be stretched to a mask.

    Args:
        features: (1, C, h, w).
        size: (height, width) of the image.

    Returns:
        (C, 1, height, width), float32 or wider.
    """
    maps = upsample(at_least_float32(features), size).transpose(0, 1)
    least = maps.amin(dim=(-2, -1), keepdim=True)
    spread = maps.amax(dim=(-2, -1), keepdim=True) - least
    nothing = constant_channels(features)[:, None, None, None] | (spread == 0)
    return torch.where(nothing, 0.0, (maps - least) / torch.where(nothing, 1.0, spread))


def place_masks(places: Tensor, height: int, width: int, *, neighbours: bool) -> Tensor:
    """Masks over a layer that each leave one place alone, or a place and, weaker, its neighbours.

    Args:
        places: int64 (R,), each in [0, height * width): row by row.
        height: of the layer.
        width: of the layer.
        neighbours: whether a mask is the 3x3 Gaussian around its place, not 1 at the place itself.

    Returns:
        float32 (R, height, width).
    """
    masks = F.one_hot(places, height * width).to(torch.float32).view(-1, 1, height, width)
    if neighbours:
        masks = F.conv2d(masks, torch.tensor(_NEIGHBOURHOOD, device=masks.device)[None, None], padding=1)
    return masks[:, 0]


def empty_channels(output: LayerOutput, grid: Grid) -> Tensor:
    """Which channels of a layer's map are zero everywhere: nothing can be taken out of them.

    Args:
        output: what the layer returned for one image.
        grid: its form.

    Returns:
        bool (C,), in the order of `to_map`'s channels.
    """
    return torch.cat([(features == 0).all(dim=-1).all(dim=-1)[0] for features in _levels(output, grid)])


def without_channels(output: LayerOutput, grid: Grid, channels: Tensor) -> LayerOutput:
    """Copies of a layer's output for one image, with one channel of the map set to zero in each.

    In a pyramid, a channel is one of the level that it comes from, and the other levels stay as they are. Tokens before
    the grid are no part of the map, and stay.

    Args:
        output: what the layer returned for one image.
        grid: its form.
        channels: int64 (R,), in the order of `to_map`'s channels.

    Returns:
        A layer's output of R rows.
    """
    changed, first = [], 0
    for features in _levels(output, grid):
        own = torch.arange(first, first + features.shape[1], device=features.device)
        out = (own == channels[:, None])[:, :, None, None]
        changed.append(features.expand(len(channels), -1, -1, -1).masked_fill(out, 0.0))
        first += features.shape[1]
    return _put_back(changed, output, grid)


def places_alone(output: LayerOutput, grid: Grid, masks: Tensor) -> LayerOutput:
    """Copies of a layer's output for one image, each multiplied by a mask.

    Tokens before the grid stay as they are. Masks are resized to each level of a pyramid without interpolation, so
    that every place of a finer level belongs to one place of the mask.

    Args:
        output: what the layer returned for one image.
        grid: its form.
        masks: (R, h, w), of the map's size.

    Returns:
        A layer's output of R rows.
    """
    changed = []
    for features in _levels(output, grid):
        resized = F.interpolate(masks[:, None], size=features.shape[-2:], mode="nearest")
        changed.append(features * resized.to(features.dtype))
    return _put_back(changed, output, grid)


def _levels(output: LayerOutput, grid: Grid) -> list[Tensor]:
    """The maps (1, C_i, h_i, w_i) that a layer's output is made of: one, or a pyramid's."""
    if grid.layout is Layout.PYRAMID and not isinstance(output, Tensor):
        return list(output.values())
    return [to_map(output, grid)]


def _put_back(levels: list[Tensor], output: LayerOutput, grid: Grid) -> LayerOutput:
    if isinstance(output, Tensor):
        return from_map(levels[0], output, grid)
    return dict(zip(output, levels, strict=True))
