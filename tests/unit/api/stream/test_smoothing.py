"""Temporal smoothing against a plain float64 loop."""

import dataclasses

import numpy as np
import pytest

from heatlens_server.api.stream.frames import MapSmoother
from heatlens_server.core.results import Finding, ImageResult


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
