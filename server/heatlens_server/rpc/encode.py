"""From an engine's result to ExplainResponse."""

from datetime import timedelta

import numpy as np

from heatlens import PixelBox, place_map
from heatlens.v1 import explain_pb2 as pb
from heatlens_server.engines.base import Float32Array, ImageResult
from heatlens_server.errors import InvalidArgument
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.rpc.limits import Limits
from heatlens_server.rpc.validation import ExplainPlan
from heatlens_server.serving.lane import Explained
from heatlens_server.serving.served import ServedModel

_PROTO_TYPES = {"<f4": pb.DATA_TYPE_FLOAT32, "<f2": pb.DATA_TYPE_FLOAT16, "u1": pb.DATA_TYPE_UINT8}

_ENVELOPE_BYTES = 64 * 1024
"""Room for everything in an answer but its maps and predictions."""

_PREDICTION_BYTES = 256
"""Room for one prediction with its label."""


def check_answer_size(plan: ExplainPlan, image: FittedImage, limits: Limits) -> None:
    """Refuse an answer that cannot be sent, before the model runs for it.

    Raises:
        InvalidArgument: the maps and predictions would not fit in a message.
    """
    if plan.place_on_source:
        pixels = image.source_width_px * image.source_height_px
    else:
        # A layer's own map is far smaller than the input.
        pixels = image.pixels.shape[0] * image.pixels.shape[1] if plan.spec.upsample else 0
    maps_bytes = plan.target_count * pixels * np.dtype(plan.map_dtype).itemsize
    size_bytes = maps_bytes + plan.top_predictions * _PREDICTION_BYTES + _ENVELOPE_BYTES
    if size_bytes > limits.max_message_bytes:
        raise InvalidArgument.of(
            "options.map_size" if maps_bytes else "options.top_predictions",
            f"{plan.target_count} maps of this size and {plan.top_predictions} predictions would take "
            f"{size_bytes} bytes, more than the {limits.max_message_bytes} of a message; ask for a smaller map_size "
            "or map_type, or for fewer classes",
            reason="ANSWER_TOO_LARGE",
            answer_bytes=size_bytes,
            max_message_bytes=limits.max_message_bytes,
        )


def encode(explained: Explained, plan: ExplainPlan, model: ServedModel) -> pb.ExplainResponse:
    """Build the answer. Fast at layer and input size; placing maps on large source images takes milliseconds each."""
    result = explained.completed.result
    probabilities = softmax(result.logits)
    timing = explained.completed
    return pb.ExplainResponse(
        explanations=[_explanation(k, explained, plan, probabilities, model) for k in range(len(result.class_ids))],
        predictions=_predictions(result, probabilities, plan.top_predictions, model),
        source_region=_box(explained.image.region),
        source_width_px=explained.image.source_width_px,
        source_height_px=explained.image.source_height_px,
        model=model.name,
        model_version=model.version,
        timing=pb.Timing(
            queue_duration=timedelta(seconds=timing.queue_s),
            preprocess_duration=timedelta(seconds=explained.preprocess_s),
            compute_duration=timedelta(seconds=timing.compute_s),
            batch_size=timing.batch_size,
        ),
    )


def softmax(logits: Float32Array) -> Float32Array:
    """Probabilities float32 (C,) of logits float32 (C,); computed in float64."""
    wide = logits.astype(np.float64)
    exponentials = np.exp(wide - wide.max())
    probabilities: Float32Array = (exponentials / exponentials.sum()).astype(np.float32)
    return probabilities


def _explanation(
    k: int, explained: Explained, plan: ExplainPlan, probabilities: Float32Array, model: ServedModel
) -> pb.Explanation:
    result = explained.completed.result
    class_id = result.class_ids[k]
    values = result.maps[k]
    if plan.place_on_source:
        image = explained.image
        values = place_map(values, image.region, (image.source_width_px, image.source_height_px))
    return pb.Explanation(
        class_id=class_id,
        label=model.label(class_id),
        logit=float(result.logits[class_id]),
        probability=float(probabilities[class_id]),
        map=_tensor(values, plan.map_dtype),
        map_scale=float(result.scales[k]),
        map_offset=float(result.offsets[k]),
    )


def _tensor(values: Float32Array, dtype: str) -> pb.Tensor:
    stored = np.rint(values * 255.0) if dtype == "u1" else values
    return pb.Tensor(data_type=_PROTO_TYPES[dtype], shape=values.shape, data=stored.astype(dtype, copy=False).tobytes())


def _predictions(
    result: ImageResult, probabilities: Float32Array, count: int, model: ServedModel
) -> list[pb.ClassScore]:
    # A stable sort, so that classes of equal score come in order of their ids.
    order = np.argsort(-result.logits, kind="stable")[:count] if count else ()
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
