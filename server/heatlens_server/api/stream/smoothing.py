"""Steadier maps: an exponential moving average over the frames of a stream. Pure numpy."""

import dataclasses

import numpy as np

from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.results import ImageResult


class MapSmoother:
    """Averages the raw maps of each class: average = weight * average + (1 - weight) * map.

    The averages start anew when the maps' size changes, or the most probable class, where the image as a whole has
    classes. A class that a frame does not explain starts anew the next time: no more maps are kept than one answer
    holds. The one map of an embedding model has class 0.
    """

    def __init__(self, weight: float) -> None:
        """Start without a past.

        Args:
            weight: of the past, in [0, 1).
        """
        self._weight = weight
        self._key: tuple[int, ...] = ()
        self._averages: dict[int, Float32Array] = {}

    def smooth(self, result: ImageResult, *, size_px: tuple[int, int] | None = None) -> ImageResult:
        """The result of the next frame, with the averages for its maps.

        Args:
            result: what the engine said; its class ids are all different.
            size_px: the size that the maps will be brought to, if that is another than theirs.

        Returns:
            The same classes with maps float32 (K, h, w) in [0, 1], stretched anew: map * scale + offset is the average
            of the raw maps. A flat average is all zeros with scale 0. The first frame comes back as it is. All that
            is not the maps stays the frame's own.
        """
        # Pixels and embeddings are not of one class: there are no logits of the image as a whole.
        top = int(np.argmax(result.logits)) if result.logits.size else -1
        key = (top, *result.maps.shape[1:], *(size_px or ()))
        past = self._averages if key == self._key else {}
        self._key = key
        raw = result.maps * result.scales[:, None, None] + result.offsets[:, None, None]
        for k, class_id in enumerate(result.class_ids):
            if class_id in past:
                raw[k] = self._weight * past[class_id] + (1.0 - self._weight) * raw[k]
        self._averages = dict(zip(result.class_ids, raw, strict=True))
        return _stretched(result, raw) if past else result


def _stretched(result: ImageResult, raw: Float32Array) -> ImageResult:
    """The result with raw maps in place of its own, min-max per map."""
    offsets = raw.min(axis=(1, 2))
    scales = raw.max(axis=(1, 2)) - offsets
    # A true division: 1 / scale is infinite for denormal scales.
    maps = (raw - offsets[:, None, None]) / np.where(scales == 0, np.float32(1), scales)[:, None, None]
    return dataclasses.replace(result, maps=maps, scales=scales, offsets=offsets)
