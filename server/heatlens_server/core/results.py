"""What an engine says about one image."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from heatlens_server.core.arrays import Float32Array, UInt8Array
from heatlens_server.core.methods import Metric


@dataclass(frozen=True, slots=True)
class Finding:
    """What is explained about one image, where class ids and logits do not say it all.

    Attributes:
        class_id: its class; 0 where there are none.
        logit: the score before softmax or sigmoid.
        probability: in [0, 1].
        box: left, top, right, bottom in pixels of the engine's input image, half open; None but for detections.
        area: the part of the input that is predicted as the class, in [0, 1]; segmentation only.
        value: regression: the predicted value, which has no logit and no probability; None elsewhere.
    """

    class_id: int
    logit: float
    probability: float
    box: tuple[float, float, float, float] | None = None
    area: float = 0.0
    value: float | None = None


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What an engine says about one image.

    Attributes:
        logits: float32 (C,), the score of every class; empty where the task has none for the image as a whole.
        class_ids: the classes of the K explanations, in the order asked for.
        maps: float32 (K, h, w) in [0, 1].
        scales: float32 (K,); maps * scales + offsets is the raw map.
        offsets: float32 (K,).
        findings: K, one per explanation; None for classification, where logits and class ids say it all.
        faithfulness: K, the measures asked for; None if none were.
        mask: segmentation, if asked for: uint8 (H, W), the class of each pixel of the input.
        masks: segmentation with classes that may overlap, if asked for, in place of `mask`: uint8 (K, H, W), one per
            explanation, 1 where its class is predicted.
        embedding: embedding models: float32 (D,).
        values: regression: float32 (C,), all outputs.
    """

    logits: Float32Array
    class_ids: tuple[int, ...]
    maps: Float32Array
    scales: Float32Array
    offsets: Float32Array
    findings: tuple[Finding, ...] | None = None
    faithfulness: tuple[Mapping[Metric, float], ...] | None = None
    mask: UInt8Array | None = None
    masks: UInt8Array | None = None
    embedding: Float32Array | None = None
    values: Float32Array | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all scores, values and maps are numbers."""
        arrays = (self.logits, self.maps, *(() if self.values is None else (self.values,)))
        return all(bool(np.isfinite(array).all()) for array in arrays)
