"""From raw maps to the map that callers get, in the one order that every engine and exporter shares."""

from collections.abc import Sequence

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.normalize import NormalizedMap, normalize
from heatlens_server.backends.torch.cam.precision import wide
from heatlens_server.backends.torch.cam.resize import combine_layers, upsample
from heatlens_server.core.methods import Aggregation


def saliency(
    raw_maps: Sequence[Tensor],
    size: tuple[int, int] | None = None,
    aggregation: Aggregation = Aggregation.MEAN,
) -> NormalizedMap:
    """Finish a map: ReLU, combine the layers, upsample, min-max.

    The ReLU comes before the upsampling, as in Grad-CAM's definition of the map; negative pixels would otherwise
    eat into the edges of positive ones. Min-max comes last, so that the returned map spans [0, 1] at its own size.

    Args:
        raw_maps: one (N, K, h_i, w_i) per target layer, from `heatlens_server.backends.torch.cam.methods.raw_map`.
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
    positive = torch.relu(wide(raw))
    return normalize(positive if size is None else upsample(positive, size))
