"""The frames of a stream in order: their ids, which of them are explained, and the average of their maps."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heatlens_server.api.query import EmptyMessage, Frame, StreamConfig
from heatlens_server.api.stream.frames import FrameOrder, FrameSampler, FrameTime, MapSmoother
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.results import Finding, ImageResult


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


# Which frames are explained.


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


# Temporal smoothing against a plain float64 loop.


def result(raw: np.ndarray, class_ids: tuple[int, ...], top: int = 0) -> ImageResult:
    """What an engine would say about raw maps (K, h, w)."""
    logits = np.zeros(10, np.float32)
    logits[top] = 1
    offsets = raw.min(axis=(1, 2))
    scales = raw.max(axis=(1, 2)) - offsets
    maps = (raw - offsets[:, None, None]) / np.where(scales == 0, 1, scales)[:, None, None]
    return ImageResult(
        logits, class_ids, maps.astype(np.float32), scales.astype(np.float32), offsets.astype(np.float32)
    )


def raw_of(smoothed: ImageResult) -> np.ndarray:
    return smoothed.maps.astype(np.float64) * smoothed.scales[:, None, None] + smoothed.offsets[:, None, None]


def frames(count: int, classes: int = 2, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.gamma(0.5, 3.0, (classes, 5, 7)) + rng.uniform(0, 2) for _ in range(count)]


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, float(np.float32(0.99999994))])
def test_it_is_the_average_of_raw_maps_per_class(weight):
    smoother = MapSmoother(weight)
    averages: dict[int, np.ndarray] = {}
    for i, raw in enumerate(frames(40)):
        class_ids = (3, 5) if i % 2 else (5, 3)  # the order of classes does not matter
        smoothed = smoother.smooth(result(raw, class_ids))
        assert smoothed.class_ids == class_ids
        for k, class_id in enumerate(class_ids):
            past = averages.get(class_id)
            averages[class_id] = raw[k] if past is None else weight * past + (1 - weight) * raw[k]
            np.testing.assert_allclose(raw_of(smoothed)[k], averages[class_id], rtol=1e-4, atol=1e-5)
        assert smoothed.maps.dtype == smoothed.scales.dtype == smoothed.offsets.dtype == np.float32
        np.testing.assert_array_equal(smoothed.maps.min(axis=(1, 2)), 0)
        np.testing.assert_array_equal(smoothed.maps.max(axis=(1, 2)), 1)


def test_the_first_frame_is_as_the_engine_said():
    first = result(frames(1)[0], (1, 2))
    assert MapSmoother(0.9).smooth(first) is first


@pytest.mark.parametrize(
    ("class_ids", "further"),
    [
        ((5, 2), {"mask": np.full((4, 4), 5, np.uint8)}),
        ((0,), {"embedding": np.array([0.6, -0.8], np.float32)}),
    ],
    ids=["segmentation", "embedding"],
)
def test_without_logits_of_the_image_maps_are_averaged_by_class_and_all_else_is_the_frames_own(class_ids, further):
    smoother = MapSmoother(0.5)
    one, two = frames(2, classes=len(class_ids))
    for i, raw in enumerate((one, two)):
        findings = tuple(Finding(class_id, 1.0 + i, 0.5 + i / 8, area=i / 4) for class_id in class_ids)
        sent = dataclasses.replace(result(raw, class_ids), logits=np.empty(0, np.float32), findings=findings, **further)
        smoothed = smoother.smooth(sent)
    np.testing.assert_allclose(raw_of(smoothed), 0.5 * one + 0.5 * two, rtol=1e-4, atol=1e-5)
    assert not smoothed.logits.size
    assert smoothed.findings is findings
    assert all(getattr(smoothed, name) is value for name, value in further.items())


def test_a_weight_of_zero_changes_nothing():
    smoother = MapSmoother(0.0)
    for raw in frames(5):
        np.testing.assert_allclose(raw_of(smoother.smooth(result(raw, (1, 2)))), raw, rtol=1e-5, atol=1e-6)


def restarted(smoother: MapSmoother, sent: ImageResult, **kwargs) -> bool:
    return smoother.smooth(sent, **kwargs) is sent


def test_a_new_top_class_starts_anew_even_for_the_same_explained_classes():
    one, two, three = frames(3)
    smoother = MapSmoother(0.9)
    smoother.smooth(result(one, (1, 2), top=1))
    assert restarted(smoother, result(two, (1, 2), top=2))
    assert not restarted(smoother, result(three, (1, 2), top=2))


def test_another_size_starts_anew():
    one, two, _ = frames(3)
    smoother = MapSmoother(0.9)
    smoother.smooth(result(one, (1, 2)), size_px=(10, 20))
    assert not restarted(smoother, result(two, (1, 2)), size_px=(10, 20))
    assert restarted(smoother, result(two, (1, 2)), size_px=(10, 21))
    assert restarted(smoother, result(two[:, :3], (1, 2)), size_px=(10, 21))
    assert not restarted(smoother, result(one[:, :3], (1, 2)), size_px=(10, 21))


def test_a_class_that_was_not_explained_starts_anew_and_the_others_go_on():
    one, two, three = frames(3)
    smoother = MapSmoother(0.5)
    smoother.smooth(result(one, (1, 2)))
    smoother.smooth(result(two, (1, 3)))
    smoothed = raw_of(smoother.smooth(result(three, (1, 2))))
    np.testing.assert_allclose(smoothed[0], 0.25 * one[0] + 0.25 * two[0] + 0.5 * three[0], rtol=1e-4)
    np.testing.assert_allclose(smoothed[1], three[1], rtol=1e-4, atol=1e-5)


def test_flat_maps_are_zeros_with_scale_zero():
    smoother = MapSmoother(0.7)
    for value in (0.3, 0.1, 5.0):
        smoothed = smoother.smooth(result(np.full((1, 4, 4), value), (1,)))
    assert not smoothed.maps.any()
    assert smoothed.scales[0] == 0
    assert smoothed.offsets[0] == pytest.approx(0.7 * (0.7 * 0.3 + 0.3 * 0.1) + 0.3 * 5.0, rel=1e-5)


def test_tiny_maps_are_not_flattened():
    smoother = MapSmoother(0.5)
    for raw in frames(4):
        smoothed = smoother.smooth(result(raw * 1e-30, (1, 2)))
    np.testing.assert_array_equal(smoothed.maps.max(axis=(1, 2)), 1)
    assert (smoothed.scales > 0).all()


def test_what_was_returned_is_not_changed_later():
    smoother = MapSmoother(0.5)
    answers = [smoother.smooth(result(raw, (1, 2))) for raw in frames(3)]
    copies = [answer.maps.copy() for answer in answers]
    smoother.smooth(result(frames(1, seed=9)[0], (1, 2)))
    for answer, copy in zip(answers, copies, strict=True):
        np.testing.assert_array_equal(answer.maps, copy)
