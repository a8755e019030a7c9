"""Which messages are frames, and which frames are explained: every n-th, at most so many per second."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heatlens_server.api.query import EmptyMessage, Frame, StreamConfig
from heatlens_server.api.stream.frames import FrameOrder, FrameSampler, FrameTime
from heatlens_server.core.errors import InvalidArgument


def chosen(sampler: FrameSampler, captured: list[float]) -> list[int]:
    """Indices of the frames allowed; they are all read at once."""
    return [i for i, at_s in enumerate(captured) if sampler.allows(FrameTime(0.0, at_s))]


def chosen_as_read(sampler: FrameSampler, read: list[float]) -> list[int]:
    return [i for i, at_s in enumerate(read) if sampler.allows(FrameTime(at_s))]


def test_without_limits_every_frame_is_allowed():
    assert chosen(FrameSampler(), [0.0, 0.0, -5.0, 1e300]) == [0, 1, 2, 3]


@pytest.mark.parametrize("every", [1, 2, 3, 7])
def test_the_first_of_every_n(every):
    assert chosen(FrameSampler(every=every), [0.0] * 20) == list(range(0, 20, every))


@pytest.mark.parametrize("source_fps", [24, 25, 30, 60, 29.97])
@pytest.mark.parametrize("decimals", [9, 6, 3])
@pytest.mark.parametrize("divisor", [1, 2, 3, 5])
def test_whole_fractions_of_the_sources_rate_are_exact(source_fps, decimals, divisor):
    captured = [round(i / source_fps, decimals) for i in range(3000)]
    picked = chosen(FrameSampler(max_per_second=source_fps / divisor), captured)
    assert picked == list(range(0, 3000, divisor))


@pytest.mark.parametrize("limit", [0.5, 7.0, 10.0, 25.0])
def test_jitter_changes_neither_the_rate_much_nor_the_bound(limit):
    rng = np.random.default_rng(5)
    captured = np.sort(np.arange(9000) / 30 + rng.uniform(-0.015, 0.015, 9000))
    picked = captured[chosen(FrameSampler(max_per_second=limit), list(captured))]
    assert 0.9 * 300 * limit <= len(picked) <= 300 * limit + 1
    starts = np.arange(0, 299, 0.1)
    in_a_second = np.searchsorted(picked, starts + 1) - np.searchsorted(picked, starts)
    assert in_a_second.max() <= limit + 1


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    limit=st.floats(0.01, 1000),
    gaps=st.lists(st.floats(0, 3, allow_subnormal=False), min_size=1, max_size=60),
)
def test_never_more_than_the_limit_and_one_in_any_second(limit, gaps):
    captured = np.cumsum(gaps)
    picked = captured[chosen(FrameSampler(max_per_second=limit), list(captured))]
    assert picked[0] == captured[0]
    for i, start in enumerate(picked):
        in_a_second = np.searchsorted(picked, start + 0.998) - i
        assert in_a_second < limit + 2


def test_after_a_gap_nothing_is_caught_up():
    captured = [0.0, 0.1, 60.03, 60.04, 60.06, 60.08, 60.11, 60.16, 60.21]
    assert chosen(FrameSampler(max_per_second=10), captured) == [0, 1, 2, 6, 8]


def test_both_limits_must_allow_and_only_explained_frames_take_a_turn():
    captured = [i / 10 for i in range(12)]
    # Frames 0, 2, 4, ... of 10 per second, and at most 2 per second of those.
    assert chosen(FrameSampler(every=2, max_per_second=2), captured) == [0, 6, 10]


def test_without_capture_times_the_time_of_reading_counts():
    assert chosen_as_read(FrameSampler(max_per_second=1), [5.0, 5.5, 6.0, 6.1, 7.0]) == [0, 2, 4]


def test_a_clock_that_is_set_back_stops_nothing():
    captured = [3600.0, 3601.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert chosen(FrameSampler(max_per_second=1), captured) == [0, 1, 2, 4, 6]


def test_a_clip_played_backwards_is_sampled_at_the_same_rate():
    captured = [i / 30 for i in reversed(range(90))]
    assert chosen(FrameSampler(max_per_second=10), captured) == list(range(0, 90, 3))


def test_frames_with_and_without_capture_time_mixed():
    sampler = FrameSampler(max_per_second=1)
    times = [FrameTime(i * 0.25, 1e9 + i * 0.25 if i % 2 else None) for i in range(12)]
    assert [i for i, time in enumerate(times) if sampler.allows(time)] == [0, 4, 8]


@pytest.mark.parametrize("limit", [5e-324, 1e-9, 1e308])
@pytest.mark.parametrize("captured", [[0.0, 9e18, -9e18, 9e18], [-9.2e18, 0.0, 1.0, 1.1]])
def test_extreme_values_are_taken_as_they_are(limit, captured):
    assert 0 in chosen(FrameSampler(max_per_second=limit), captured)


@pytest.mark.parametrize(
    ("good", "bad"),
    [([], None), ([0], 0), ([1, 2, 3], 2), ([-(2**63)], -(2**63)), ([5], -5), ([-3, 0, 2**63 - 1], 7)],
)
def test_ids_increase(good, bad):
    order = FrameOrder()
    assert [order.check(Frame(i)).frame_id for i in good] == good
    if bad is not None:
        with pytest.raises(InvalidArgument) as raised:
            order.check(Frame(bad))
        assert [violation.field for violation in raised.value.violations] == ["frame_id"]
        assert raised.value.metadata == {"frame_id": str(bad), "last_frame_id": str(good[-1])}


@pytest.mark.parametrize(("message", "field"), [(EmptyMessage(), "frame"), (StreamConfig(), "config")])
def test_later_messages_hold_frames(message, field):
    with pytest.raises(InvalidArgument) as raised:
        FrameOrder().check(message)
    assert [violation.field for violation in raised.value.violations] == [field]
    assert raised.value.reason == "PROTOCOL_VIOLATION"
