"""From an engine's result to ExplainResponse."""

from collections.abc import Mapping
from datetime import timedelta

import numpy as np

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.api.tasks.base import TaskWire
from heatlens_server.api.tasks.table import task_wire
from heatlens_server.core.arrays import Float32Array, UInt8Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.geometry import PixelBox, place_map
from heatlens_server.core.methods import Metric
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import place_mask
from heatlens_server.scheduling.entry import QueueResult

_PROTO_TYPES = {"<f4": pb.DATA_TYPE_FLOAT32, "<f2": pb.DATA_TYPE_FLOAT16, "u1": pb.DATA_TYPE_UINT8}

_ENVELOPE_BYTES = 64 * 1024
"""Room for everything in an answer but its maps and predictions."""

_PREDICTION_BYTES = 256
"""Room for one prediction with its label."""


def check_answer_size(plan: ExplainPlan, image: FittedImage, limits: Limits, *, map_count: int) -> None:
    """Refuse an answer that cannot be sent; if it can be told, before the model runs for it.

    Args:
        plan: how the image is explained.
        image: the image.
        limits: in force.
        map_count: how many maps the answer holds.

    Raises:
        InvalidArgument: the maps and predictions would not fit in a message.
    """
    at_input = image.pixels.shape[0] * image.pixels.shape[1]
    if plan.place_on_source:
        pixels = image.source_width_px * image.source_height_px
    else:
        # A layer's own map is far smaller than the input.
        pixels = at_input if plan.spec.upsample or plan.spec.method.traits.always_at_input_size else 0
    maps_bytes = map_count * pixels * np.dtype(plan.map_dtype).itemsize
    if plan.spec.return_mask:
        maps_bytes += max(pixels, at_input)
    size_bytes = maps_bytes + plan.top_predictions * _PREDICTION_BYTES + _ENVELOPE_BYTES
    if size_bytes > limits.max_message_bytes:
        raise InvalidArgument.of(
            "options.map_size" if maps_bytes else "options.top_predictions",
            f"{map_count} maps of this size and {plan.top_predictions} predictions would take "
            f"{size_bytes} bytes, more than the {limits.max_message_bytes} of a message; ask for a smaller map_size "
            "or map_type, or for less to be explained",
            reason="ANSWER_TOO_LARGE",
            answer_bytes=size_bytes,
            max_message_bytes=limits.max_message_bytes,
        )


def encode(explained: QueueResult, plan: ExplainPlan, model: ServedModel) -> pb.ExplainResponse:
    """Build the answer. Fast at layer and input size; placing maps on large source images takes milliseconds each."""
    result, timing = explained.result, explained.timing
    wire = task_wire(model.capabilities.task)
    findings = wire.findings(result)
    return pb.ExplainResponse(
        explanations=[_explanation(k, finding, explained, plan, model) for k, finding in enumerate(findings)],
        predictions=_predictions(result, wire, plan.top_predictions, model),
        source_region=_box(explained.image.region),
        source_width_px=explained.image.source_width_px,
        source_height_px=explained.image.source_height_px,
        model=model.name,
        model_version=model.version,
        timing=pb.Timing(
            queue_duration=timedelta(seconds=timing.queue_s),
            preprocess_duration=timedelta(seconds=timing.preprocess_s),
            compute_duration=timedelta(seconds=timing.compute_s),
            batch_size=timing.batch_size,
        ),
        predicted_mask=None if result.mask is None else _mask(result.mask, explained.image, plan),
        embedding=None if result.embedding is None else _tensor(result.embedding, "<f4"),
    )


def _explanation(
    k: int, finding: Finding, explained: QueueResult, plan: ExplainPlan, model: ServedModel
) -> pb.Explanation:
    result, image = explained.result, explained.image
    values = result.maps[k]
    if plan.place_on_source:
        values = place_map(values, image.region, (image.source_width_px, image.source_height_px))
    return pb.Explanation(
        class_id=finding.class_id,
        label=model.label(finding.class_id),
        logit=finding.logit,
        probability=finding.probability,
        map=_tensor(values, plan.map_dtype),
        map_scale=float(result.scales[k]),
        map_offset=float(result.offsets[k]),
        box=None if finding.box is None else _source_box(finding.box, image),
        area=finding.area,
        faithfulness=None if result.faithfulness is None else _faithfulness(result.faithfulness[k]),
    )


def _faithfulness(measures: Mapping[Metric, float]) -> faithfulness_pb2.Faithfulness:
    return faithfulness_pb2.Faithfulness(**{metric.replace("-", "_"): value for metric, value in measures.items()})


def _source_box(box: tuple[float, float, float, float], image: FittedImage) -> pb.PixelBox:
    """A box in pixels of the model's input, in pixels of the source image."""
    height_px, width_px = image.pixels.shape[:2]
    region = image.region
    scale_x, scale_y = (region.right - region.left) / width_px, (region.bottom - region.top) / height_px
    left, top, right, bottom = box
    return pb.PixelBox(
        left=region.left + left * scale_x,
        top=region.top + top * scale_y,
        right=region.left + right * scale_x,
        bottom=region.top + bottom * scale_y,
    )


def _mask(mask: UInt8Array, image: FittedImage, plan: ExplainPlan) -> pb.Tensor:
    if plan.place_on_source:
        mask = place_mask(mask, image)
    return pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=mask.shape, data=mask.tobytes())


def _tensor(values: Float32Array, dtype: str) -> pb.Tensor:
    stored = np.rint(values * 255.0) if dtype == "u1" else values
    return pb.Tensor(data_type=_PROTO_TYPES[dtype], shape=values.shape, data=stored.astype(dtype, copy=False).tobytes())


def _predictions(result: ImageResult, wire: TaskWire, count: int, model: ServedModel) -> list[pb.ClassScore]:
    if not count:
        return []
    probabilities = wire.probabilities(result)
    # A stable sort, so that classes of equal score come in order of their ids.
    order = np.argsort(-result.logits, kind="stable")[:count]
    return [
        pb.ClassScore(
            class_id=int(class_id),
            label=model.label(int(class_id)),
            logit=float(result.logits[class_id]),
            probability=float(probabilities[class_id]),
        )
        for class_id in order
    ]


def _box(box: PixelBox) -> pb.PixelBox:
    return pb.PixelBox(left=box.left, top=box.top, right=box.right, bottom=box.bottom)
