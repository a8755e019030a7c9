"""Maps of one size from maps of another, and several layers' maps as one, on what a graph returns. No torch in here.

The same maths as `cam.saliency`, which graphs end with at the layer's own size; the tests hold the two
against each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.methods import Aggregation


@dataclass(frozen=True, slots=True, eq=False)
class Maps:
    """Finished maps of one size: values * scales + offsets is relu(raw).

    Attributes:
        values: float32 (N, K, h, w) in [0, 1]; all zeros where the map is flat.
        scales: float32 (N, K); 0 where the map is flat.
        offsets: float32 (N, K).
    """

    values: Float32Array
    scales: Float32Array
    offsets: Float32Array


def finish(layers: Sequence[Maps], size: tuple[int, int] | None, aggregation: Aggregation = Aggregation.MEAN) -> Maps:
    """Do what `cam.saliency.saliency` does, from maps that it finished at the layers' own sizes.

    Args:
        layers: one per target layer, at least one; of one N and K.
        size: (height, width) of the result; None for the (largest) layer's own.
        aggregation: how several layers' maps become one.

    Returns:
        Maps (N, K, height, width). For one layer scales and offsets lead back to the enlarged relu(raw map); for
        several, to the mean, maximum or product of their normalised maps.
    """
    if len(layers) > 1:
        return combine(layers, size, aggregation)
    return layers[0] if size is None else enlarge(layers[0], size)


def enlarge(maps: Maps, size: tuple[int, int]) -> Maps:
    """Resize maps bilinearly with half-pixel centres and stretch them to [0, 1] again.

    Interpolation is linear, so enlarging values and relu(raw) differ by the same scale and offset.

    Args:
        maps: of any size.
        size: (height, width) wanted, each >= 1.
    """
    if maps.values.shape[2:] == size:
        return maps
    values = np.empty((*maps.values.shape[:2], *size), np.float32)
    lows, spans = np.empty((2, *maps.values.shape[:2]), np.float32)
    for index in np.ndindex(lows.shape):
        _resize(maps.values[index], values[index])
        lows[index], spans[index] = _stretch(values[index])
    # Scales that are not finite come from the model: callers see it by the values of the maps.
    with np.errstate(invalid="ignore", over="ignore"):
        return Maps(values, maps.scales * spans, maps.scales * lows + maps.offsets)


def combine(
    layers: Sequence[Maps], size: tuple[int, int] | None = None, aggregation: Aggregation = Aggregation.MEAN
) -> Maps:
    """Make one map of several layers', each normalised on its own, and stretch it to [0, 1].

    Args:
        layers: at least one; of one N and K.
        size: (height, width) of the result; None for the largest height and width among the layers.
        aggregation: as in `cam.saliency.combine_layers`.
    """
    height, width = size or (
        max(layer.values.shape[2] for layer in layers),
        max(layer.values.shape[3] for layer in layers),
    )
    counts = layers[0].values.shape[:2]
    values = np.empty((*counts, height, width), np.float32)
    lows, spans = np.empty((2, *counts), np.float32)
    resized = np.empty((height, width), np.float32)
    stretched = aggregation is Aggregation.PRODUCT
    add = _STEPS[aggregation]
    for index in np.ndindex(counts):
        one = values[index]
        for position, layer in enumerate(layers):
            target = resized if position else one
            _resize(layer.values[index], target)
            if stretched:
                _stretch(target)
            if position:
                add(one, resized, out=one)
        if aggregation is Aggregation.MEAN:
            one /= np.float32(len(layers))
        lows[index], spans[index] = _stretch(one)
    return Maps(values, spans, lows)


_STEPS: Mapping[Aggregation, np.ufunc] = {
    Aggregation.MEAN: np.add,
    Aggregation.MAX: np.maximum,
    Aggregation.PRODUCT: np.multiply,
}


def _resize(source: Float32Array, target: Float32Array) -> None:
    """Resize (h, w) into a map of another size."""
    cv2.resize(source, target.shape[::-1], dst=target, interpolation=cv2.INTER_LINEAR)


def _stretch(values: Float32Array) -> tuple[np.float32, np.float32]:
    """Min-max one map in place; return what was subtracted and divided out. A flat map becomes zeros and 0."""
    low = values.min()
    span = values.max() - low
    values -= low
    if span != 0:
        values /= span
    return low, span
