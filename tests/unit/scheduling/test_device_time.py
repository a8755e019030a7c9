"""The moving average of running times, computed by hand."""

import pytest

from heatlens_server.scheduling.device_time import BatchTimeEstimate


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
