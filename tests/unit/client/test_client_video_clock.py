"""Times of frames from timestamps, good and bad."""

import math

import pytest

from heatlens._video.clock import MAX_STEP_S, Clock


@pytest.mark.parametrize(
    ("stamps", "times"),
    [
        ([0, 0.1, 0.2, 0.9], [0.1, 0.2, 0.9]),
        # From another start.
        ([77.5, 77.6, 79.5], [0.1, 2.0]),
        # None: the constant rate.
        ([0, 0, 0, 0], [0.25, 0.5, 0.75]),
        ([0, math.nan, math.nan], [0.25, 0.5]),
        ([0, math.inf, math.inf], [0.25, 0.5]),
        # Back, and on from there.
        ([5, 5.1, 1, 1.1], [0.1, 0.35, 0.45]),
        # A jump that is no pause.
        ([0, 0.1, 95_443, 95_443.1], [0.1, 0.35, 0.45]),
        ([0, MAX_STEP_S], [MAX_STEP_S]),
        # Missing once.
        ([0, 0.1, math.nan, 0.3, 0.4], [0.1, 0.35, 0.6, 0.7]),
    ],
)
def test_times(stamps, times):
    clock = Clock(0.25, stamps[0])
    assert clock.time_s == 0
    assert [clock.tick(stamp) for stamp in stamps[1:]] == pytest.approx(times)
    assert clock.time_s == pytest.approx(times[-1])
