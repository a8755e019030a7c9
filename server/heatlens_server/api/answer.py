"""What a caller is told: from an engine's result to an answer, whatever the transport."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.api.checks import Limits
from heatlens_server.api.plan import Plan
from heatlens_server.api.query import MapType
from heatlens_server.core.arrays import Float32Array, UInt8Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.geometry import PixelBox, place_map
from heatlens_server.core.methods import Metric
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import place_mask
from heatlens_server.scheduling.entry import QueueResult, Timing

MapValues = npt.NDArray[Any]
"""Elements of one of `MapType`."""

_ENVELOPE_BYTES = 64 * 1024
"""Room for everything in an answer but its maps and predictions."""

_PREDICTION_BYTES = 256
"""Room for one prediction with its label."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class and how probable it is, or a value. The label is empty if it is not known."""

    class_id: int
    label: str
    logit: float
    probability: float
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is said about one class, box or similarity.

    Attributes:
        class_score: its class.
        map_values: (h, w), of the plan's size and element type, in [0, 1]; UINT8 in [0, 255].
        map_scale: map in [0, 1] * scale + offset is the raw map.
        map_offset: see `map_scale`.
        box: detection: in pixels of the source image.
        area: segmentation: the part of the input that is predicted as the class.
        faithfulness: the measures asked for; None if none were.
        mask: segmentation with classes that may overlap, if asked for: uint8 (h, w), 1 where the class is predicted.
    """

    class_score: ClassScore
    map_values: MapValues
    map_scale: float
    map_offset: float
    box: PixelBox | None = None
    area: float = 0.0
    faithfulness: Mapping[Metric, float] | None = None
    mask: UInt8Array | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said about one image.

    Attributes:
        explanations: one per class, box or similarity, in the order asked for.
        predictions: the most probable classes, or the first values, as many as were asked for.
        image: how the source image was fitted: the region that the maps cover, and the source image's size.
        model: the model's name.
        model_version: of its weights.
        timing: how long it took.
        mask: segmentation, if asked for: uint8 (h, w), the class of each pixel.
        embedding: embedding models: float32 (D,).
        warnings: what may be wrong with the image or its explanation.
    """

    explanations: tuple[Explanation, ...]
    predictions: tuple[ClassScore, ...]
    image: FittedImage
    model: str
    model_version: str
    timing: Timing
    mask: UInt8Array | None = None
    embedding: Float32Array | None = None
    warnings: tuple[str, ...] = ()


def check_answer_size(plan: Plan, image: FittedImage, limits: Limits, *, map_count: int) -> int:
    """Refuse an answer that cannot be sent; if it can be told, before the model runs for it.

    Args:
        plan: how the image is explained.
        image: the image.
        limits: in force.
        map_count: how many maps the answer holds for this image.

    Returns:
        Its size, in bytes, at most; as if all images that share the answer were like this one.

    Raises:
        InvalidArgument: the maps and predictions would not fit in a message.
    """
    at_input = image.pixels.shape[0] * image.pixels.shape[1]
    if plan.place_on_source:
        pixels = image.source_width_px * image.source_height_px
    else:
        # A layer's own map is far smaller than the input.
        pixels = at_input if plan.spec.upsample or plan.spec.method.traits.always_at_input_size else 0
    maps_bytes = map_count * pixels * np.dtype(plan.map_type.value).itemsize
    if plan.spec.return_mask:
        maps_bytes += (map_count if plan.masks_overlap else 1) * max(pixels, at_input)
    size_bytes = plan.images * (maps_bytes + plan.top_predictions * _PREDICTION_BYTES) + _ENVELOPE_BYTES
    if size_bytes > limits.max_message_bytes:
        raise InvalidArgument.of(
            "map_size" if maps_bytes else "top_predictions",
            f"{plan.images * map_count} maps of this size and {plan.top_predictions} predictions would take "
            f"{size_bytes} bytes, more than the {limits.max_message_bytes} of a message; ask for a smaller map_size "
            "or map_type, or for less to be explained",
            reason="ANSWER_TOO_LARGE",
            answer_bytes=size_bytes,
            max_message_bytes=limits.max_message_bytes,
        )
    return size_bytes


def answer_of(done: QueueResult, plan: Plan, model: ServedModel) -> Answer:
    """Make the answer. Fast at layer and input size; placing maps on large source images takes milliseconds each."""
    result, image = done.result, done.image
    probabilities = model.capabilities.task.traits.class_probabilities(result.logits)
    findings = result.findings
    if findings is None:
        findings = tuple(
            Finding(class_id, logit=float(result.logits[class_id]), probability=float(probabilities[class_id]))
            for class_id in result.class_ids
        )
    return Answer(
        explanations=tuple(_explanation(k, finding, done, plan, model) for k, finding in enumerate(findings)),
        predictions=_predictions(result, probabilities, plan.top_predictions, model),
        image=image,
        model=model.name,
        model_version=model.version,
        timing=done.timing,
        mask=_on_source(result.mask, plan, image),
        embedding=result.embedding,
        warnings=(*image.warnings, *plan.warnings),
    )


def _explanation(k: int, finding: Finding, done: QueueResult, plan: Plan, model: ServedModel) -> Explanation:
    result, image = done.result, done.image
    values = result.maps[k]
    if plan.place_on_source:
        values = place_map(values, image.region, (image.source_width_px, image.source_height_px))
    return Explanation(
        ClassScore(finding.class_id, model.label(finding.class_id), finding.logit, finding.probability, finding.value),
        map_values=_stored(values, plan.map_type),
        map_scale=float(result.scales[k]),
        map_offset=float(result.offsets[k]),
        box=None if finding.box is None else _source_box(finding.box, image),
        area=finding.area,
        faithfulness=None if result.faithfulness is None else result.faithfulness[k],
        mask=_on_source(None if result.masks is None else result.masks[k], plan, image),
    )


def _on_source(mask: UInt8Array | None, plan: Plan, image: FittedImage) -> UInt8Array | None:
    """A mask of the model's input at the size that the maps have, if they have that of the source image."""
    return mask if mask is None or not plan.place_on_source else place_mask(mask, image)


def _stored(values: Float32Array, map_type: MapType) -> MapValues:
    scaled = np.rint(values * 255.0) if map_type is MapType.UINT8 else values
    return scaled.astype(map_type.value, copy=False)


def _source_box(box: tuple[float, float, float, float], image: FittedImage) -> PixelBox:
    """A box in pixels of the model's input, in pixels of the source image."""
    height_px, width_px = image.pixels.shape[:2]
    region = image.region
    scale_x, scale_y = (region.right - region.left) / width_px, (region.bottom - region.top) / height_px
    left, top, right, bottom = box
    return PixelBox(
        left=region.left + left * scale_x,
        top=region.top + top * scale_y,
        right=region.left + right * scale_x,
        bottom=region.top + bottom * scale_y,
    )


def _predictions(
    result: ImageResult, probabilities: Float32Array, count: int, model: ServedModel
) -> tuple[ClassScore, ...]:
    if not count:
        return ()
    if result.values is not None:
        # Values have no order: they come in that of the outputs.
        return tuple(
            ClassScore(output, model.label(output), 0.0, 0.0, value)
            for output, value in enumerate(result.values[:count].tolist())
        )
    # A stable sort, so that classes of equal score come in order of their ids.
    order = np.argsort(-result.logits, kind="stable")[:count].tolist()
    return tuple(
        ClassScore(class_id, model.label(class_id), float(result.logits[class_id]), float(probabilities[class_id]))
        for class_id in order
    )
