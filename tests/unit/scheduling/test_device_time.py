"""The moving average of running times, computed by hand."""

import pytest

from heatlens_server.scheduling.device_time import HANG_FACTOR, BatchTimeEstimate, DeviceTime


def learned(*batches: tuple[int, float]) -> BatchTimeEstimate:
    estimate = BatchTimeEstimate()
    for size, seconds in batches:
        estimate.add(size, seconds)
    return estimate


def test_nothing_is_known_at_first():
    assert learned().seconds(4) == 0.0
    assert learned().images_per_second() == 0.0


def test_the_first_batch_counts_in_full_and_later_ones_by_a_quarter():
    assert learned((4, 1.0)).seconds(4) == 1.0
    assert learned((4, 1.0), (4, 3.0)).seconds(4) == pytest.approx(1.5)
    assert learned((4, 1.0), (4, 3.0), (4, 1.5)).seconds(4) == pytest.approx(1.5)


def test_sizes_are_learned_apart():
    estimate = learned((1, 0.1), (8, 0.4))
    assert (estimate.seconds(1), estimate.seconds(8)) == (0.1, 0.4)


def test_unseen_sizes_follow_the_nearest():
    estimate = learned((2, 0.2), (8, 0.5))
    assert estimate.seconds(16) == pytest.approx(1.0)
    assert estimate.seconds(4) == pytest.approx(0.4)  # twice the batch of two
    assert estimate.seconds(7) == pytest.approx(0.5)  # no less than the batch of eight
    assert estimate.seconds(1) == pytest.approx(0.2)


def test_it_converges_to_a_new_speed():
    estimate = learned((4, 10.0), *[(4, 1.0)] * 40)
    assert estimate.seconds(4) == pytest.approx(1.0, abs=1e-3)


def test_throughput_is_the_best_seen():
    assert learned((1, 0.1), (8, 0.4)).images_per_second() == pytest.approx(20)


def test_a_batch_that_took_no_time_is_no_throughput():
    assert learned((4, 0.0)).images_per_second() == 0.0
    assert learned((4, 0.0), (2, 0.5)).images_per_second() == pytest.approx(4)


def test_what_runs_hangs_beyond_a_floor_and_a_multiple_of_its_usual_time():
    device = DeviceTime()
    assert device.hangs_s(1e9, floor_s=1.0) == 0.0
    device.start(100.0, 4, step=False)
    assert device.hangs_s(101.0, floor_s=1.0) == 0.0
    assert device.hangs_s(102.0, floor_s=1.0) == 2.0
    device.finish(100.5)
    device.start(200.0, 4, step=False)
    assert device.hangs_s(200.0 + 0.5 * HANG_FACTOR, floor_s=1.0) == 0.0
    assert device.hangs_s(201.0 + 0.5 * HANG_FACTOR, floor_s=1.0) == 1.0 + 0.5 * HANG_FACTOR
    # Steps are learned apart.
    device.finish(201.0)
    device.start(300.0, 4, step=True)
    assert device.hangs_s(302.0, floor_s=1.0) == 2.0
