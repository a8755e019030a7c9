"""From results to answers: probabilities, element types, order, and the size that is refused."""

import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.api.tasks.classification import softmax
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.geometry import PixelBox, place_map
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage, Interpolation, PreprocessSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.entry import QueueResult, Timing
from heatlens_server.transports.grpc.encode import check_answer_size, encode

LARGEST = float(np.finfo(np.float32).max)
LABELS = ("cat", "dog", "bird", "fish")
MAPS = np.array([[[0.0, 0.25], [0.5, 1.0]], [[1.0, 0.0], [0.1, 0.9]]], np.float32)
TWO = ClassIds((2, 0))
FITTED = FittedImage(
    pixels=np.zeros((4, 4, 3), np.uint8), region=PixelBox(2, 0, 10, 8), source_width_px=12, source_height_px=8
)


def model(labels: tuple[str, ...] = LABELS) -> ServedModel:
    return ServedModel(
        name="m",
        version="7",
        labels=labels,
        preprocess=PreprocessSpec(4, (4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), Interpolation.BILINEAR),
        capabilities=Capabilities("torch", "cpu", "fp32", 4, 4, 4, (Method.GRAD_CAM,), ("body",)),
        default_method=Method.GRAD_CAM,
        max_batch_size=1,
        max_delay_s=0.0,
        queue=None,  # encoding never touches it
    )


def plan(target=TWO, *, upsample=False, place=False, map_dtype="<f4", top_predictions=0) -> ExplainPlan:
    spec = MapSpec(Method.GRAD_CAM, ("body",), upsample=upsample)
    return ExplainPlan(target, spec, place, map_dtype, top_predictions)


def explained(logits=(1.0, 3.0, 3.0, -2.0)) -> QueueResult:
    result = ImageResult(
        logits=np.array(logits, np.float32),
        class_ids=(2, 0),
        maps=MAPS,
        scales=np.array([2.0, 0.5], np.float32),
        offsets=np.array([0.0, 0.125], np.float32),
    )
    return QueueResult(result, FITTED, Timing(preprocess_s=0.5, queue_s=0.001, compute_s=0.25, batch_size=3))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([5.0], [1.0]),
        ([0.0] * 4, [0.25] * 4),
        ([LARGEST, LARGEST], [0.5, 0.5]),
        ([-LARGEST, -LARGEST], [0.5, 0.5]),
        ([LARGEST, -LARGEST], [1.0, 0.0]),
        ([1e4, 1e4 - 1], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]),
        ([-1e4, 0.0], [0.0, 1.0]),
        ([0.0, np.log(3)], [0.25, 0.75]),
    ],
)
def test_softmax_in_extreme_cases(logits, expected):
    probabilities = softmax(np.array(logits, np.float32))
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


def test_softmax_of_many_classes_sums_to_one():
    logits = np.random.default_rng(0).normal(0, 5, 21_841).astype(np.float32)
    assert softmax(logits).sum(dtype=np.float64) == pytest.approx(1, abs=1e-5)


def test_every_field_of_an_answer():
    answer = encode(explained(), plan(), model())
    assert (answer.model, answer.model_version) == ("m", "7")
    region = answer.source_region
    assert (region.left, region.top, region.right, region.bottom) == (2, 0, 10, 8)
    assert answer.timing.queue_duration.ToMicroseconds() == 1_000
    assert answer.timing.preprocess_duration.ToMicroseconds() == 500_000
    assert answer.timing.compute_duration.ToMicroseconds() == 250_000
    assert answer.timing.batch_size == 3
    assert not answer.predictions
    probabilities = softmax(np.array([1.0, 3.0, 3.0, -2.0], np.float32))
    for k, (class_id, label, logit) in enumerate([(2, "bird", 3.0), (0, "cat", 1.0)]):
        one = answer.explanations[k]
        assert (one.class_id, one.label, one.logit) == (class_id, label, logit)
        assert one.probability == pytest.approx(probabilities[class_id])
        assert (one.map.data_type, list(one.map.shape)) == (pb.DATA_TYPE_FLOAT32, [2, 2])
        np.testing.assert_array_equal(np.frombuffer(one.map.data, "<f4").reshape(2, 2), MAPS[k])
    assert [(one.map_scale, one.map_offset) for one in answer.explanations] == [(2.0, 0.0), (0.5, 0.125)]


def test_predictions_are_in_order_of_score_and_then_of_id():
    answer = encode(explained(), plan(top_predictions=4), model())
    listed = [(score.class_id, score.label) for score in answer.predictions]
    assert listed == [(1, "dog"), (2, "bird"), (0, "cat"), (3, "fish")]
    assert [score.class_id for score in encode(explained(), plan(top_predictions=1), model()).predictions] == [1]
    # Sorts that are not stable show only on longer rows.
    even_first = encode(explained([1.0, 0.0] * 50), plan(top_predictions=100), model(labels=()))
    assert [score.class_id for score in even_first.predictions] == [*range(0, 100, 2), *range(1, 100, 2)]


def test_model_without_labels():
    answer = encode(explained(), plan(top_predictions=2), model(labels=()))
    assert [score.label for score in [*answer.predictions, *answer.explanations]] == [""] * 4


def test_uint8_is_rounded_not_cut():
    answer = encode(explained(), plan(map_dtype="u1"), model())
    # 0.25 * 255 = 63.75 and 0.5 * 255 = 127.5.
    assert list(answer.explanations[0].map.data) == [0, 64, 128, 255]
    assert answer.explanations[0].map.data_type == pb.DATA_TYPE_UINT8


def test_float16():
    answer = encode(explained(), plan(map_dtype="<f2"), model())
    assert answer.explanations[1].map.data_type == pb.DATA_TYPE_FLOAT16
    np.testing.assert_array_equal(
        np.frombuffer(answer.explanations[1].map.data, "<f2").reshape(2, 2), MAPS[1].astype(np.float16)
    )


def test_maps_on_the_source_are_placed_as_the_sdk_places_them():
    answer = encode(explained(), plan(upsample=True, place=True), model())
    placed = np.frombuffer(answer.explanations[0].map.data, "<f4").reshape(8, 12)
    np.testing.assert_array_equal(placed, place_map(MAPS[0], FITTED.region, (12, 8)))
    assert not placed[:, :2].any()
    assert not placed[:, 10:].any()


ENVELOPE_BYTES = 64 * 1024


@pytest.mark.parametrize(
    ("asked", "maps_bytes"),
    [
        (plan(upsample=True), 2 * 4 * 4 * 4),
        (plan(TopK(4), upsample=True, map_dtype="<f2"), 4 * 4 * 4 * 2),
        (plan(upsample=True, place=True), 2 * 12 * 8 * 4),
        (plan(TopK(1), upsample=True, place=True, map_dtype="u1"), 12 * 8),
    ],
)
def test_answers_are_refused_from_one_byte_too_many(asked, maps_bytes):
    def limits(max_message_bytes: int) -> Limits:
        return Limits(
            max_message_bytes, max_image_pixels=1, max_queue_length=1, max_targets=4, max_streams=1, max_in_flight=1
        )

    check_answer_size(asked, FITTED, limits(maps_bytes + ENVELOPE_BYTES), map_count=asked.target_count)
    with pytest.raises(InvalidArgument) as raised:
        check_answer_size(asked, FITTED, limits(maps_bytes + ENVELOPE_BYTES - 1), map_count=asked.target_count)
    assert raised.value.reason == "ANSWER_TOO_LARGE"
    assert raised.value.violations[0].field == "options.map_size"
    assert raised.value.metadata["answer_bytes"] == str(maps_bytes + ENVELOPE_BYTES)
