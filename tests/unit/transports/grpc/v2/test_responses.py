"""From answers to responses: the images of a request are stacked, and what no tensor holds is refused."""

import numpy as np
import pytest

from heatlens_server.api.answer import Answer, ClassScore, Explanation
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.scheduling.entry import Timing
from heatlens_server.transports.grpc.v2.responses import OUTPUTS, infer_response_of

IMAGE = FittedImage(np.zeros((4, 4, 3), np.uint8), PixelBox(0, 0, 4, 4), source_width_px=4, source_height_px=4)
TIMING = Timing(preprocess_s=0.5, queue_s=0.001, compute_s=0.25, batch_size=3)


def answer(*explanations, warnings=()):
    return Answer(explanations, (), IMAGE, "m", "7", TIMING, warnings=warnings)


def explanation(class_id, *, shape=(2, 3), value=None):
    score = ClassScore(class_id, f"Bär {class_id}", 3.0, class_id / 8, value)
    return Explanation(score, np.full(shape, class_id, np.float32), 1.0, 0.0)


def response(*answers, outputs=tuple(OUTPUTS), max_message_bytes=1 << 20):
    return infer_response_of(answers, outputs=outputs, request_id="id", max_message_bytes=max_message_bytes)


def tensors(sent):
    return {
        tensor.name: (tensor.datatype, tuple(tensor.shape), data)
        for tensor, data in zip(sent.outputs, sent.raw_output_contents, strict=True)
    }


def test_images_are_stacked():
    sent = response(answer(explanation(1), explanation(2)), answer(explanation(3), explanation(4)))
    assert (sent.model_name, sent.model_version, sent.id, dict(sent.parameters)) == ("m", "7", "id", {})
    found = tensors(sent)
    assert found["MAP"] == ("FP32", (2, 2, 2, 3), np.repeat(np.arange(1, 5, dtype="<f4"), 6).tobytes())
    assert found["CLASS_ID"] == ("INT32", (2, 2), np.arange(1, 5, dtype="<i4").tobytes())
    assert found["SCORE"] == ("FP32", (2, 2), (np.arange(1, 5, dtype="<f4") / 8).tobytes())
    labels = [f"Bär {i}".encode() for i in range(1, 5)]
    assert found["LABEL"] == ("BYTES", (2, 2), b"".join(len(one).to_bytes(4, "little") + one for one in labels))


def test_what_is_not_wanted_is_not_sent():
    assert list(tensors(response(answer(explanation(1)), outputs=("SCORE", "MAP")))) == ["SCORE", "MAP"]


def test_a_value_is_a_score():
    assert tensors(response(answer(explanation(1, value=-2.5))))["SCORE"][2] == np.array(-2.5, "<f4").tobytes()


def test_nothing_found_is_an_empty_tensor():
    found = tensors(response(answer()))
    assert (found["MAP"], found["CLASS_ID"]) == (("FP32", (1, 0, 0, 0), b""), ("INT32", (1, 0), b""))


def test_warnings_are_a_parameter_each_once():
    sent = response(answer(explanation(1), warnings=("a", "b")), answer(explanation(1), warnings=("a",)))
    assert sent.parameters["warnings"].string_param == "a\nb"


@pytest.mark.parametrize(
    ("second", "outputs"),
    [
        (answer(explanation(1), explanation(2)), ("SCORE",)),
        (answer(explanation(1, shape=(3, 3))), ("MAP",)),
    ],
)
def test_answers_of_different_shapes_are_refused(second, outputs):
    with pytest.raises(InvalidArgument, match=r"IMAGE: .* send them one by one"):
        response(answer(explanation(1)), second, outputs=outputs)


def test_sizes_of_maps_that_are_not_sent_do_not_matter():
    assert response(answer(explanation(1)), answer(explanation(1, shape=(3, 3))), outputs=("SCORE",)).outputs


def test_an_answer_that_cannot_be_sent_is_refused():
    large = answer(explanation(1, shape=(20, 20)))
    assert response(large, max_message_bytes=2000).outputs
    with pytest.raises(InvalidArgument) as raised:
        response(large, large, max_message_bytes=2000)
    assert raised.value.reason == "ANSWER_TOO_LARGE"
