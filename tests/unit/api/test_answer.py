"""From results to answers: probabilities, element types, order, and the size that is refused."""

import dataclasses

import numpy as np
import pytest

from heatlens_server.api.answer import answer_of, check_answer_size
from heatlens_server.api.checks import Limits
from heatlens_server.api.plan import Plan
from heatlens_server.api.query import MapType
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.geometry import PixelBox, place_map
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage, Interpolation, PreprocessSpec
from heatlens_server.core.results import Finding, ImageResult
from heatlens_server.core.targets import ClassIds, TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.imaging.mask import OUTSIDE, place_mask
from heatlens_server.scheduling.entry import QueueResult, Timing

MAPS = np.array([[[0.0, 0.25], [0.5, 1.0]], [[1.0, 0.0], [0.1, 0.9]]], np.float32)
LABELS = ("cat", "dog", "bird", "fish")
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
        queue=None,  # answers never touch it
    )


def plan(target=TWO, *, upsample=False, place=False, map_type=MapType.FLOAT32, top_predictions=0) -> Plan:
    spec = MapSpec(Method.GRAD_CAM, ("body",), upsample=upsample)
    return Plan(target, spec, place, map_type, top_predictions)


def done(logits=(1.0, 3.0, 3.0, -2.0)) -> QueueResult:
    result = ImageResult(
        logits=np.array(logits, np.float32),
        class_ids=(2, 0),
        maps=MAPS,
        scales=np.array([2.0, 0.5], np.float32),
        offsets=np.array([0.0, 0.125], np.float32),
    )
    return QueueResult(result, FITTED, Timing(preprocess_s=0.5, queue_s=0.001, compute_s=0.25, batch_size=3))


def test_every_field_of_an_answer():
    answer = answer_of(done(), plan(), model())
    assert (answer.model, answer.model_version, answer.image) == ("m", "7", FITTED)
    assert (answer.timing, answer.predictions) == (done().timing, ())
    probabilities = Task.CLASSIFICATION.traits.class_probabilities(np.array([1.0, 3.0, 3.0, -2.0], np.float32))
    for k, (class_id, label, logit) in enumerate([(2, "bird", 3.0), (0, "cat", 1.0)]):
        one = answer.explanations[k]
        score = one.class_score
        assert (score.class_id, score.label, score.logit) == (class_id, label, logit)
        assert score.probability == pytest.approx(probabilities[class_id])
        np.testing.assert_array_equal(one.map_values, MAPS[k])
    assert [(one.map_scale, one.map_offset) for one in answer.explanations] == [(2.0, 0.0), (0.5, 0.125)]


def test_maps_at_the_models_own_size_are_not_copied():
    values = answer_of(done(), plan(), model()).explanations[0].map_values
    assert np.shares_memory(values, MAPS)


def test_boxes_come_in_pixels_of_the_source():
    found = dataclasses.replace(done().result, findings=(Finding(1, 0.5, 0.25, (1.0, 0.0, 3.0, 4.0)), Finding(0, 1, 1)))
    answer = answer_of(dataclasses.replace(done(), result=found), plan(), model())
    assert answer.explanations[0].box == PixelBox(4, 0, 8, 8)
    assert (answer.explanations[0].class_score.label, answer.explanations[1].box) == ("dog", None)


def test_masks_of_classes_that_overlap_are_placed_as_maps_are():
    masks = np.zeros((2, 4, 4), np.uint8)
    masks[0, :2] = masks[1, 1:3] = 1
    found = dataclasses.replace(done(), result=dataclasses.replace(done().result, masks=masks))
    at_input = answer_of(found, plan(), model())
    assert at_input.mask is None
    for one, mask in zip(at_input.explanations, masks, strict=True):
        np.testing.assert_array_equal(one.mask, mask)
    placed = answer_of(found, plan(upsample=True, place=True), model()).explanations[1].mask
    np.testing.assert_array_equal(placed, place_mask(masks[1], FITTED))
    assert set(np.unique(placed)) == {0, 1, OUTSIDE}


def test_predictions_are_in_order_of_score_and_then_of_id():
    answer = answer_of(done(), plan(top_predictions=4), model())
    listed = [(score.class_id, score.label) for score in answer.predictions]
    assert listed == [(1, "dog"), (2, "bird"), (0, "cat"), (3, "fish")]
    assert [score.class_id for score in answer_of(done(), plan(top_predictions=1), model()).predictions] == [1]
    # Sorts that are not stable show only on longer rows.
    even_first = answer_of(done([1.0, 0.0] * 50), plan(top_predictions=100), model(labels=()))
    assert [score.class_id for score in even_first.predictions] == [*range(0, 100, 2), *range(1, 100, 2)]


def test_model_without_labels():
    answer = answer_of(done(), plan(top_predictions=2), model(labels=()))
    scores = [*answer.predictions, *(explanation.class_score for explanation in answer.explanations)]
    assert [score.label for score in scores] == [""] * 4


def test_uint8_is_rounded_not_cut():
    answer = answer_of(done(), plan(map_type=MapType.UINT8), model())
    # 0.25 * 255 = 63.75 and 0.5 * 255 = 127.5.
    np.testing.assert_array_equal(answer.explanations[0].map_values, np.array([[0, 64], [128, 255]], np.uint8))
    assert answer.explanations[0].map_values.dtype == np.uint8


def test_float16():
    values = answer_of(done(), plan(map_type=MapType.FLOAT16), model()).explanations[1].map_values
    assert values.dtype == np.dtype("<f2")
    np.testing.assert_array_equal(values, MAPS[1].astype(np.float16))


def test_maps_on_the_source_are_placed_as_the_sdk_places_them():
    placed = answer_of(done(), plan(upsample=True, place=True), model()).explanations[0].map_values
    np.testing.assert_array_equal(placed, place_map(MAPS[0], FITTED.region, (12, 8)))
    assert not placed[:, :2].any()
    assert not placed[:, 10:].any()


ENVELOPE_BYTES = 64 * 1024


def with_masks(asked: Plan, *, overlap: bool) -> Plan:
    spec = dataclasses.replace(asked.spec, return_mask=True)
    return dataclasses.replace(asked, spec=spec, masks_overlap=overlap)


@pytest.mark.parametrize(
    ("asked", "maps_bytes"),
    [
        (plan(upsample=True), 2 * 4 * 4 * 4),
        (plan(TopK(4), upsample=True, map_type=MapType.FLOAT16), 4 * 4 * 4 * 2),
        (plan(upsample=True, place=True), 2 * 12 * 8 * 4),
        (plan(TopK(1), upsample=True, place=True, map_type=MapType.UINT8), 12 * 8),
        (with_masks(plan(upsample=True), overlap=False), 2 * 4 * 4 * 4 + 4 * 4),
        (with_masks(plan(upsample=True), overlap=True), 2 * 4 * 4 * 4 + 2 * 4 * 4),
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
    assert raised.value.violations[0].field == "map_size"
    assert raised.value.metadata["answer_bytes"] == str(maps_bytes + ENVELOPE_BYTES)


def test_warnings_are_those_of_the_image_and_of_what_was_asked():
    image = dataclasses.replace(FITTED, warnings=("dark",))
    asked = dataclasses.replace(plan(), warnings=("layers: change nothing",))
    assert answer_of(dataclasses.replace(done(), image=image), asked, model()).warnings == (
        "dark",
        "layers: change nothing",
    )
    assert answer_of(done(), plan(), model()).warnings == ()
