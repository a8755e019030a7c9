"""From answers to the protocol's messages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from heatlens_server.api.answer import Answer, Explanation
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.transports.grpc.v2 import inference_pb2 as pb


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor of answers: its datatype, its sides beyond images and explanations, and the bytes of one explanation."""

    datatype: str
    sides: int
    encode: Callable[[Explanation], bytes]


def _score(explanation: Explanation) -> float:
    """The probability; of regression, which has none, the value."""
    score = explanation.class_score
    return score.probability if score.value is None else score.value


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(4, "little") + data


OUTPUTS = {
    "MAP": _Output("FP32", 2, lambda one: one.map_values.tobytes()),
    "CLASS_ID": _Output("INT32", 0, lambda one: np.array(one.class_score.class_id, "<i4").tobytes()),
    "SCORE": _Output("FP32", 0, lambda one: np.array(_score(one), "<f4").tobytes()),
    "LABEL": _Output("BYTES", 0, lambda one: _text(one.class_score.label)),
}


def infer_response_of(
    answers: Sequence[Answer], *, outputs: Sequence[str], request_id: str, max_message_bytes: int
) -> pb.ModelInferResponse:
    """The response that the answers of a request's images make, stacked.

    Args:
        answers: one or more.
        outputs: names in `OUTPUTS`.
        request_id: the caller's, sent back.
        max_message_bytes: most bytes of the response.

    Raises:
        InvalidArgument: the answers are of different shapes, or too large.
    """
    explanations = [explanation for answer in answers for explanation in answer.explanations]
    counts = {len(answer.explanations) for answer in answers}
    sizes = {explanation.map_values.shape for explanation in explanations}
    if len(counts) > 1 or ("MAP" in outputs and len(sizes) > 1):
        raise InvalidArgument.of(
            "IMAGE",
            "the images have different numbers or sizes of maps, which no tensor holds: send them one by one",
            reason="TENSOR_SIZE_MISMATCH",
        )
    stacked = (len(answers), *counts)
    map_size: tuple[int, ...] = next(iter(sizes), (0, 0))
    response = pb.ModelInferResponse(
        model_name=answers[0].model,
        model_version=answers[0].model_version,
        id=request_id,
        outputs=[
            pb.ModelInferResponse.InferOutputTensor(
                name=name,
                datatype=OUTPUTS[name].datatype,
                shape=stacked + map_size[: OUTPUTS[name].sides],
            )
            for name in outputs
        ],
        raw_output_contents=[b"".join(map(OUTPUTS[name].encode, explanations)) for name in outputs],
    )
    if warnings := dict.fromkeys(warning for answer in answers for warning in answer.warnings):
        response.parameters["warnings"].string_param = "\n".join(warnings)
    if (size_bytes := response.ByteSize()) > max_message_bytes:
        # Maps of a layer's own size are not counted before: only many images take so much.
        raise InvalidArgument.of(
            "IMAGE",
            f"the answer takes {size_bytes} bytes, more than the {max_message_bytes} of a message: send fewer images",
            reason="ANSWER_TOO_LARGE",
            answer_bytes=size_bytes,
            max_message_bytes=max_message_bytes,
        )
    return response
