"""From raw maps to the map that callers get, in the one order that every engine and exporter shares.

ReLU, resizing, combining several layers, min-max.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor

from heatlens_server.core.methods import Aggregation
from heatlens_server.maps.concrete import upsample
from heatlens_server.maps.normalization import NormalizedMap, normalize
from heatlens_server.maps.precision import at_least_float32


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of a map, in fractions of its height and width from the top left; it may reach beyond the map."""

    top: float = 0.0
    left: float = 0.0
    bottom: float = 1.0
    right: float = 1.0

    def corner(self, down: float, across: float) -> "Part":
        """The part of this part at its top left, of so much of its height and width."""
        bottom, right = self.top + (self.bottom - self.top) * down, self.left + (self.right - self.left) * across
        return Part(self.top, self.left, bottom, right)


WHOLE = Part()
"""All of a map."""


def cut(maps: Tensor, part: Part) -> Tensor:
    """A part of maps, in pixels of about their own size, bilinear between them; 0 beyond the maps.

    A side that does not begin where the maps do gets pixels of half that size: whole ones would lie between the maps'
    own, and lose what is at the edges of the part.

    Args:
        maps: (N, K, h, w) floating point.
        part: which one.

    Returns:
        (N, K, height, width), the nearest whole numbers of pixels, each >= 1; `maps` itself if the part is the whole.
    """
    if part == WHOLE:
        return maps
    down, across = part.bottom - part.top, part.right - part.left
    height = maps.shape[-2] * (1 if part.top == 0.0 else 2)
    width = maps.shape[-1] * (1 if part.left == 0.0 else 2)
    size = (max(1, round(height * down)), max(1, round(width * across)))
    # Coordinates run from -1 to 1, and so does the part in its own.
    rows = [[across, 0.0, part.left + part.right - 1.0], [0.0, down, part.top + part.bottom - 1.0]]
    grid = F.affine_grid(maps.new_tensor([rows]).expand(len(maps), -1, -1), [len(maps), 1, *size], align_corners=False)
    sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    if min(part.top, part.left) >= 0.0 and max(part.bottom, part.right) <= 1.0:
        return sampled
    return sampled * (grid.abs() <= 1.0).all(dim=-1)[:, None]


def combine_layers(
    raw_maps: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    aggregation: Aggregation = Aggregation.MEAN,
) -> Tensor:
    """Make one map of several layers': each normalised, resized, then the mean, the maximum or the product.

    Layers have gradients of different magnitude; without normalising each first, one of them would decide alone. The
    mean is that of the `grad-cam` package. The product is that of its `RefineCAM` (https://arxiv.org/abs/2605.14641),
    which stretches every layer's map to [0, 1] again once it is resized; where one layer is flat the product is zero.

    Args:
        raw_maps: one (N, K, h_i, w_i) per layer, before the ReLU; at least one.
        size: (height, width) of the result; None for the largest height and width among the layers. To get a larger
            map give its size here: resizing twice is not the same as once.
        aggregation: how.

    Returns:
        (N, K, height, width), in [0, 1] and not stretched to it again; float32 or wider.

    Raises:
        ValueError: no maps, a map that is not 4-D, or maps of different N or K.
    """
    if not raw_maps:
        raise ValueError("raw_maps: must hold at least one map")
    for maps in raw_maps:
        if maps.ndim != 4 or maps.shape[:2] != raw_maps[0].shape[:2]:
            raise ValueError(
                f"raw_maps: must all be (N, K, h, w) of one N and K, not {[tuple(m.shape) for m in raw_maps]}"
            )
    if size is None:
        size = (max(maps.shape[-2] for maps in raw_maps), max(maps.shape[-1] for maps in raw_maps))
    resized = [upsample(normalize(maps).values, size) for maps in raw_maps]
    if aggregation is Aggregation.PRODUCT:
        return torch.stack([normalize(maps).values for maps in resized]).prod(dim=0)
    stacked = torch.stack(resized)
    return stacked.amax(dim=0) if aggregation is Aggregation.MAX else stacked.mean(dim=0)


def saliency(
    raw_maps: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    aggregation: Aggregation = Aggregation.MEAN,
) -> NormalizedMap[Tensor]:
    """Finish a map: ReLU, combine the layers, upsample, min-max.

    The ReLU comes before the upsampling, as in Grad-CAM's definition of the map; negative pixels would otherwise
    eat into the edges of positive ones. Min-max comes last, so that the returned map spans [0, 1] at its own size.

    Args:
        raw_maps: one (N, K, h_i, w_i) per target layer, from `maps.methods.raw_map`.
        size: (height, width) of the result; None for the (largest) layer's own.
        aggregation: how several layers' maps become one.

    Returns:
        Maps (N, K, height, width) with scale and offset (N, K), float32 or wider. For one layer scale and offset lead
        back to the upsampled relu(raw map); for several, to what `combine_layers` makes of their normalised maps.

    Raises:
        ValueError: see `combine_layers` and `upsample`.
    """
    if len(raw_maps) != 1:
        return normalize(combine_layers(raw_maps, size, aggregation))
    (raw,) = raw_maps
    positive = torch.relu(at_least_float32(raw))
    return normalize(positive if size is None else upsample(positive, size))
