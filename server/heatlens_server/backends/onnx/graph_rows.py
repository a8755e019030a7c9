"""From targets to the rows that a graph runs on, and from what it returns to results. No torch in here.

A graph explains K classes of each of its rows, and a row is an image. A graph of any K takes the widest target's; for
one of fixed K an image whose target has more classes takes further rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.map_finish import Maps, finish
from heatlens_server.core.arrays import Float32Array, ImageArray
from heatlens_server.core.methods import ABSENT, RANKED, Aggregation
from heatlens_server.core.preprocess import PreprocessSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassTarget, TopK
from heatlens_server.imaging.preprocess import normalise
from heatlens_server.maps.targets import resolve

Int64Array = npt.NDArray[np.int64]

_FURTHER_ROWS = 8
"""Images that want more classes than the graph has are run again so many rows at a time, or as many as the batch has:
memory stays what the batch needs."""


@dataclass(frozen=True, slots=True, eq=False)
class GraphRows:
    """What a graph says about R rows.

    Attributes:
        logits: float32 (R, C).
        class_ids: (R, K); ABSENT where nothing was asked for.
        maps: (R, K, h, w), at the layer's own size.
    """

    logits: Float32Array
    class_ids: Int64Array
    maps: Maps


RunGraph = Callable[[ImageArray, Int64Array], GraphRows]
"""Runs one graph on images (R, H, W, C) and class_index, (R, K): class ids, RANKED or ABSENT."""


def explain_batch(
    runs: Sequence[RunGraph],
    images: ImageArray,
    targets: Sequence[ClassTarget],
    *,
    classes: int | None,
    size: tuple[int, int] | None,
    aggregation: Aggregation = Aggregation.MEAN,
) -> list[ImageResult]:
    """Explain a batch with one graph per layer.

    Args:
        runs: one per target layer, at least one.
        images: (N, H, W, C), N >= 1.
        targets: N targets.
        classes: the graphs' K; None for any.
        size: (height, width) of the maps; None for the (largest) layer's own.
        aggregation: how several layers' maps become one.

    Returns:
        N results, in order.
    """
    first = run_wanted(runs[0], images, class_index(targets), classes)
    # Further layers get the classes that the first one found: two graphs may rank nearly equal logits differently.
    further = [run_wanted(run, images, first.class_ids, classes) for run in runs[1:]]
    maps = finish([first.maps, *(explained.maps for explained in further)], size, aggregation)
    return [
        ImageResult(
            logits=first.logits[n],
            class_ids=tuple(first.class_ids[n, :count].tolist()),
            maps=maps.values[n, :count],
            scales=maps.scales[n, :count],
            offsets=maps.offsets[n, :count],
        )
        for n, count in enumerate(target.count for target in targets)
    ]


def class_index(targets: Sequence[ClassTarget]) -> Int64Array:
    """Write targets as (N, K), K the widest one's: class ids or RANKED, short rows padded with ABSENT."""
    index = np.full((len(targets), max(target.count for target in targets)), ABSENT, np.int64)
    for row, target in zip(index, targets, strict=True):
        row[: target.count] = RANKED if isinstance(target, TopK) else target.ids
    return index


def run_wanted(run: RunGraph, images: ImageArray, wanted: Int64Array, classes: int | None) -> GraphRows:
    """RunGraph a graph for any number of classes per image.

    Args:
        run: the graph.
        images: (N, H, W, C).
        wanted: (N, K): class ids, RANKED or ABSENT.
        classes: the graph's own K; None for any.

    Returns:
        N rows, of K classes or, where the graph's K is fixed, of the next multiple of it.
    """
    if classes is None:
        return run(images, wanted)
    first = run(images, _padded(wanted[:, :classes], classes))
    if wanted.shape[1] <= classes:
        return first
    ids = _padded(resolve(first.logits, wanted), classes).reshape(len(images), -1, classes)
    # ids[n, c] is image n's c-th handful of classes; the first is done.
    image_of, further = np.nonzero((ids[:, 1:] != ABSENT).any(axis=2))
    part_of = further + 1
    step = max(len(images), _FURTHER_ROWS)
    parts = [
        run(images[image_of[i : i + step]], ids[image_of[i : i + step], part_of[i : i + step]]).maps
        for i in range(0, len(image_of), step)
    ]

    def gathered(of_first: Float32Array, of_parts: Sequence[Float32Array]) -> Float32Array:
        whole = np.zeros((*ids.shape, *of_first.shape[2:]), np.float32)
        whole[:, 0] = of_first
        whole[image_of, part_of] = np.concatenate(of_parts)
        return whole.reshape(len(images), -1, *of_first.shape[2:])

    maps = Maps(
        values=gathered(first.maps.values, [part.values for part in parts]),
        scales=gathered(first.maps.scales, [part.scales for part in parts]),
        offsets=gathered(first.maps.offsets, [part.offsets for part in parts]),
    )
    return GraphRows(first.logits, ids.reshape(len(images), -1), maps)


def _padded(ids: Int64Array, classes: int) -> Int64Array:
    """Widen (N, K) to the next multiple of `classes` with ABSENT."""
    return np.pad(ids, ((0, 0), (0, -ids.shape[1] % classes)), constant_values=ABSENT)


def planes(images: ImageArray) -> ImageArray:
    """Lay out (N, H, W, C) as (N, C, H, W), contiguous. OpenCV's split is 5 times as fast as numpy's copy."""
    count, height_px, width_px, channels = images.shape
    separated = np.empty((count, channels, height_px, width_px), images.dtype)
    for image, of_image in zip(images, separated, strict=True):
        cv2.split(image, list(of_image))
    return separated


def normalisation_table(spec: PreprocessSpec) -> Float32Array:
    """What `imaging.preprocess.normalise` makes of each of the 256 levels: float32 (C, 256)."""
    levels = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], spec.channels, axis=2)
    return normalise(levels, spec)[:, :, 0]


def normalised_planes(images: ImageArray, spec: PreprocessSpec, table: Float32Array) -> Float32Array:
    """Normalise (N, H, W, C) to float32 (N, C, H, W), exactly as `normalise` does.

    Args:
        images: uint8, whose levels are looked up, or float32.
        spec: what `table` was made of.
        table: from `normalisation_table`.
    """
    if images.dtype != np.uint8:
        return np.stack([normalise(image, spec) for image in images])
    count, height_px, width_px, channels = images.shape
    normalised = np.empty((count, channels, height_px, width_px), np.float32)
    for image, of_image in zip(images, normalised, strict=True):
        for plane, levels, target in zip(cv2.split(image), table, of_image, strict=True):
            cv2.LUT(plane, levels, target)
    return normalised
