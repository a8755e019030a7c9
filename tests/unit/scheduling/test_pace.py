"""What runs of a model take, and how much of an explanation goes in one step: computed by hand."""

import dataclasses

import pytest

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.scheduling.pace import ALONE_S, STEP_S, Pace

GRAD_CAM = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False, divisible=True)
BY_GOAL = dataclasses.replace(GRAD_CAM, by_goal=True)
SCORE_CAM = MapSpec(Method.SCORE_CAM, ("layer",), upsample=False)
PIXELS = 100


def test_several_goals_go_one_by_one_until_it_is_known_what_one_takes():
    pace = Pace()
    assert pace.divided(GRAD_CAM, PIXELS, 1) == GRAD_CAM
    assert pace.divided(GRAD_CAM, PIXELS, 2) == BY_GOAL
    # The rows of a step are not those of a goal.
    pace.learn_run(BY_GOAL, 16, PIXELS, STEP_S / 5)
    assert pace.divided(GRAD_CAM, PIXELS, 5) == GRAD_CAM
    assert pace.divided(GRAD_CAM, PIXELS, 6) == BY_GOAL


def test_goals_of_larger_images_take_longer():
    pace = Pace()
    pace.learn_run(BY_GOAL, 1, PIXELS, STEP_S / 5)
    assert pace.divided(GRAD_CAM, 4 * PIXELS, 2) == BY_GOAL
    assert pace.divided(GRAD_CAM, PIXELS // 4, 20) == GRAD_CAM


def test_goals_of_another_layer_or_method_are_not_known():
    pace = Pace()
    pace.learn_run(BY_GOAL, 1, PIXELS, 1e-6)
    for other in (
        dataclasses.replace(GRAD_CAM, layers=("early",)),
        dataclasses.replace(GRAD_CAM, method=Method.FULL_GRAD),
    ):
        assert pace.divided(other, PIXELS, 2).by_goal


def test_what_cannot_be_divided_or_goes_in_steps_anyway_stays_as_it_is():
    pace = Pace()
    whole = dataclasses.replace(GRAD_CAM, divisible=False)
    augmented = dataclasses.replace(GRAD_CAM, augment=True)
    assert pace.divided(whole, PIXELS, 100) == whole
    assert pace.divided(augmented, PIXELS, 100) == augmented


def test_a_batch_takes_as_many_images_as_a_step_has_time_for_the_goals_of():
    pace = Pace()
    pace.learn_run(BY_GOAL, 1, PIXELS, STEP_S / 20)
    # One goal each: a batch of the model's.
    assert pace.most_images(GRAD_CAM, PIXELS, 1, 16) == 16
    assert [pace.most_images(GRAD_CAM, PIXELS, count, 16) for count in (2, 4, 6, 20)] == [8, 4, 2, 1]
    # Goals of a batch took less, as on a device that runs them at once; and more, with the forward pass beside them.
    pace.learn_batch(GRAD_CAM, 4, PIXELS, STEP_S / 5, count=4)
    assert pace.most_images(GRAD_CAM, PIXELS, 5, 16) == 16
    pace.learn_batch(GRAD_CAM, 1, PIXELS, 100 * STEP_S, count=4)
    assert pace.most_images(GRAD_CAM, PIXELS, 5, 16) == 4
    assert pace.most_images(BY_GOAL, PIXELS, 5, 16) == 16


def test_images_by_a_layer_that_is_far_slower_than_the_fastest_are_as_many_as_a_step_has_time_for():
    pace = Pace()
    early = dataclasses.replace(GRAD_CAM, layers=("early",))
    assert pace.most_images(early, PIXELS, 1, 16) == 16
    pace.learn_batch(GRAD_CAM, 16, PIXELS, 4 * STEP_S)
    pace.learn_batch(early, 16, PIXELS, 8 * STEP_S)
    assert pace.most_images(early, PIXELS, 1, 16) == 16
    pace.learn_batch(early, 16, PIXELS, 40 * STEP_S)
    assert [pace.most_images(early, pixels, 1, 16) for pixels in (PIXELS, PIXELS // 5)] == [1, 4]
    # One image alone takes longer than each of many.
    pace.learn_batch(GRAD_CAM, 1, PIXELS, 4 * STEP_S)
    assert pace.most_images(GRAD_CAM, PIXELS, 1, 16) == 16


@pytest.mark.parametrize(("row_s", "rows"), [(STEP_S / 1000, 16), (STEP_S / 5.5, 5), (STEP_S, 1), (10 * STEP_S, 1)])
def test_as_many_rows_as_a_step_has_time_for(row_s, rows):
    pace = Pace()
    pace.learn_run(SCORE_CAM, 4, PIXELS, 4 * row_s)
    assert pace.rows(SCORE_CAM, PIXELS, 16) == rows


def test_a_new_model_begins_with_one_row_or_as_its_batches_allow():
    pace = Pace()
    assert pace.rows(SCORE_CAM, PIXELS, 16) == 1
    pace.learn_batch(GRAD_CAM, 2, PIXELS, 2 * STEP_S / 4)
    assert pace.rows(SCORE_CAM, PIXELS, 16) == 4
    assert pace.rows(SCORE_CAM, 2 * PIXELS, 16) == 2
    pace.learn_run(SCORE_CAM, 4, PIXELS, 4 * STEP_S / 8)
    assert pace.rows(SCORE_CAM, PIXELS, 16) == 8


def test_the_newest_run_counts_by_a_quarter():
    pace = Pace()
    pace.learn_run(SCORE_CAM, 1, PIXELS, STEP_S / 8)
    pace.learn_run(SCORE_CAM, 1, PIXELS, 5 * STEP_S / 8)
    assert pace.rows(SCORE_CAM, PIXELS, 16) == 4  # an eighth, and a quarter of four more


def test_callers_cannot_have_it_remember_any_number_of_kinds():
    pace = Pace()
    for number in range(1000):
        pace.learn_run(dataclasses.replace(BY_GOAL, layers=(str(number),)), 1, PIXELS, 1e-6)
    assert pace.divided(dataclasses.replace(GRAD_CAM, layers=("0",)), PIXELS, 2).by_goal
    assert not pace.divided(dataclasses.replace(GRAD_CAM, layers=("999",)), PIXELS, 2).by_goal


def test_steps_are_longer_while_nobody_waits():
    assert (Pace().most_s(others_wait=True), Pace().most_s(others_wait=False)) == (STEP_S, ALONE_S)
    assert STEP_S < ALONE_S < 1.0  # within a second nothing runs for callers that have left
