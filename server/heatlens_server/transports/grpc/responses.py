"""From answers to responses."""

from datetime import timedelta

import numpy as np
import numpy.typing as npt

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2
from heatlens_server.api.answer import Answer, ClassScore, Explanation
from heatlens_server.api.query import MapType
from heatlens_server.core.geometry import PixelBox

_DATA_TYPES = {
    MapType.FLOAT32.value: pb.DATA_TYPE_FLOAT32,
    MapType.FLOAT16.value: pb.DATA_TYPE_FLOAT16,
    MapType.UINT8.value: pb.DATA_TYPE_UINT8,
}


def response_of(answer: Answer) -> pb.ExplainResponse:
    """The response that an answer makes."""
    timing = answer.timing
    return pb.ExplainResponse(
        explanations=[_explanation(explanation) for explanation in answer.explanations],
        predictions=[_class_score(score) for score in answer.predictions],
        source_region=_box(answer.image.region),
        source_width_px=answer.image.source_width_px,
        source_height_px=answer.image.source_height_px,
        model=answer.model,
        model_version=answer.model_version,
        timing=pb.Timing(
            queue_duration=timedelta(seconds=timing.queue_s),
            preprocess_duration=timedelta(seconds=timing.preprocess_s),
            compute_duration=timedelta(seconds=timing.compute_s),
            batch_size=timing.batch_size,
        ),
        predicted_mask=None if answer.mask is None else _tensor(answer.mask),
        embedding=None if answer.embedding is None else _tensor(answer.embedding),
    )


def _explanation(explanation: Explanation) -> pb.Explanation:
    score, measured = explanation.class_score, explanation.faithfulness
    return pb.Explanation(
        class_id=score.class_id,
        label=score.label,
        logit=score.logit,
        probability=score.probability,
        map=_tensor(explanation.map_values),
        map_scale=explanation.map_scale,
        map_offset=explanation.map_offset,
        box=None if explanation.box is None else _box(explanation.box),
        area=explanation.area,
        faithfulness=None
        if measured is None
        else faithfulness_pb2.Faithfulness(**{metric.replace("-", "_"): value for metric, value in measured.items()}),
    )


def _class_score(score: ClassScore) -> pb.ClassScore:
    return pb.ClassScore(class_id=score.class_id, label=score.label, logit=score.logit, probability=score.probability)


def _tensor(values: npt.NDArray[np.generic]) -> pb.Tensor:
    """Elements of one of `MapType`."""
    return pb.Tensor(data_type=_DATA_TYPES[values.dtype.str], shape=values.shape, data=values.tobytes())


def _box(box: PixelBox) -> pb.PixelBox:
    return pb.PixelBox(left=box.left, top=box.top, right=box.right, bottom=box.bottom)
