"""Whether an export still is what a network is: its code may have changed in a file that no key knows of.

Both explain the same noise. Scores alone would not do: code can change a gradient and leave every score as it was.
"""

import numpy as np
import numpy.typing as npt

from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds, TopK

_IMAGES = 2
_CLASSES = 3
# How far logits may be off, relative to the largest, and raw maps, relative to their peak: what another CPU makes of
# them is less. A half precision network is compared with its float32 self.
_LOGITS_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}
_MAP_TOLERANCE = {"fp32": 1e-3, "fp16": 5e-2}
# A map whose peak is less than this share of the largest peak is compared relative to that one: rounding decides it.
_FLAT_SHARE = 1e-2

_Array = npt.NDArray[np.float64]


def is_alike(reference: Engine, exported: Engine, precision: str) -> bool:
    """Compare scores and raw maps of two engines on noise.

    Maps are those of HiResCAM, in which every value of the gradient counts, of the default layer and the most probable
    classes.

    Args:
        reference: runs the network, in fp32.
        exported: runs the export.
        precision: of the export, "fp32" or "fp16".

    Returns:
        False also if nothing can be compared, as every map is zero.
    """
    info = reference.info
    if (info.layers, info.class_count, set(info.methods) & set(CLOSED_FORMS)) != (
        exported.info.layers,
        exported.info.class_count,
        set(exported.info.methods),
    ):
        return False
    shape = (_IMAGES, info.input_height_px, info.input_width_px, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    spec = MapSpec(Method.HI_RES_CAM, info.layers[:1], upsample=False)
    expected = reference.explain(noise, [TopK(min(_CLASSES, info.class_count))] * _IMAGES, spec)
    # The same ones, whatever rounding makes of nearly equal scores.
    found = exported.explain(noise, [ClassIds(result.class_ids) for result in expected], spec)
    scores, other_scores = _scores(expected), _scores(found)
    maps, other_maps = _raw_maps(expected), _raw_maps(found)
    if scores.shape != other_scores.shape or maps.shape != other_maps.shape:
        return False
    peaks = maps.max((1, 2), keepdims=True)
    largest = peaks.max()
    units = np.where(peaks > _FLAT_SHARE * largest, peaks, largest)
    unit = np.abs(scores).max(1, keepdims=True)
    return bool(
        largest > 0
        # Not "greater than": NaN is not.
        and np.all(np.abs(other_scores - scores) <= _LOGITS_TOLERANCE[precision] * unit)
        and np.all(np.abs(other_maps - maps) <= _MAP_TOLERANCE[precision] * units)
    )


def _scores(results: list[ImageResult]) -> _Array:
    """(N, C)."""
    return np.stack([result.logits for result in results]).astype(np.float64)


def _raw_maps(results: list[ImageResult]) -> _Array:
    """relu(raw map), (N * K, h, w)."""
    return np.concatenate(
        [
            result.maps.astype(np.float64) * result.scales[:, None, None] + result.offsets[:, None, None]
            for result in results
        ]
    )
