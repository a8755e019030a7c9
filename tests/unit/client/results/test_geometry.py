"""Placement against a slow float64 reference written from the definition, pixel by pixel."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heatlens import PixelBox, place_map
from heatlens._results.geometry import covered_pixels


def position(pixel, start, stop, count):
    """Where on an axis of the map a pixel is read; None if it is outside of the region."""
    if start <= pixel + 0.5 < stop:
        return min(max((pixel + 0.5 - start) * count / (stop - start) - 0.5, 0), count - 1)
    nearby = range(math.floor(start) - 1, math.ceil(stop) + 2)
    if any(start <= other + 0.5 < stop for other in nearby) or pixel != math.floor((start + stop) / 2):
        return None
    return (count - 1) / 2


def place_slowly(values, region, size):
    """The definition in `place_map`'s docstring, one pixel at a time, in float64."""
    left, top, right, bottom = (float(np.float32(e)) for e in (region.left, region.top, region.right, region.bottom))
    h, w = values.shape
    width, height = size
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            u, v = position(x, left, right, w), position(y, top, bottom, h)
            if u is None or v is None:
                continue
            i, j = int(u), int(v)
            i1, j1 = min(i + 1, w - 1), min(j + 1, h - 1)
            above = values[j, i] * (1 - (u - i)) + values[j, i1] * (u - i)
            below = values[j1, i] * (1 - (u - i)) + values[j1, i1] * (u - i)
            out[y, x] = above * (1 - (v - j)) + below * (v - j)
    return out


def random_map(h, w, seed=0):
    return np.random.default_rng(seed).random((h, w), dtype=np.float32)


@pytest.mark.parametrize(
    ("shape", "region", "size"),
    [
        ((7, 7), PixelBox(0, 0, 30, 20), (30, 20)),
        ((7, 7), PixelBox(5.25, 0.5, 25.75, 19.4), (30, 20)),
        ((3, 5), PixelBox(-4.5, -2.25, 33.1, 21.9), (30, 20)),
        ((40, 50), PixelBox(2, 3, 12, 9), (30, 20)),
        ((1, 1), PixelBox(1, 1, 3, 3), (4, 4)),
        ((1, 9), PixelBox(0, 0, 30, 20), (30, 20)),
        ((9, 1), PixelBox(0, 0, 30, 20), (30, 20)),
        ((4, 4), PixelBox(0, 0, 150, 131), (150, 131)),
        ((2, 2), PixelBox(2.6, 2.6, 3.4, 3.4), (6, 6)),
        ((2, 2), PixelBox(40, 40, 50, 50), (6, 6)),
        ((2, 2), PixelBox(-50, -50, -40, -40), (6, 6)),
    ],
)
def test_matches_the_definition(shape, region, size):
    values = random_map(*shape)
    placed = place_map(values, region, size)
    assert placed.dtype == np.float32
    assert placed.shape == (size[1], size[0])
    np.testing.assert_allclose(placed, place_slowly(values.astype(np.float64), region, size), atol=3e-7)


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    left=st.floats(-20, 20),
    top=st.floats(-20, 20),
    width=st.one_of(st.floats(0.0625, 1), st.floats(1, 60)),
    height=st.one_of(st.floats(0.0625, 1), st.floats(1, 60)),
    image_w=st.integers(1, 24),
    image_h=st.integers(1, 24),
)
def test_matches_the_definition_anywhere(h, w, left, top, width, height, image_w, image_h):
    region = PixelBox(left, top, left + width, top + height)
    values = random_map(h, w, seed=h * 10 + w)
    reference = place_slowly(values.astype(np.float64), region, (image_w, image_h))
    np.testing.assert_allclose(place_map(values, region, (image_w, image_h)), reference, atol=2e-6)


def test_whole_image_is_opencv_resize():
    values = random_map(14, 14)
    resized = cv2.resize(values, (640, 480), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(place_map(values, PixelBox(0, 0, 640, 480), (640, 480)), resized, atol=1e-6)


def test_same_size_is_the_map_itself():
    values = random_map(5, 8)
    np.testing.assert_array_equal(place_map(values, PixelBox(0, 0, 8, 5), (8, 5)), values)


def test_zero_outside_and_edge_repeated_inside():
    placed = place_map(np.ones((3, 3), np.float32), PixelBox(2, 1, 6, 4), (8, 6))
    expected = np.zeros((6, 8), np.float32)
    expected[1:4, 2:6] = 1
    np.testing.assert_array_equal(placed, expected)


def test_a_peak_lands_where_it_belongs():
    values = np.zeros((7, 7), np.float32)
    values[2, 5] = 1
    placed = place_map(values, PixelBox(100, 20, 310, 230), (400, 300))
    y, x = np.unravel_index(placed.argmax(), placed.shape)
    # The cell's centre: 100 + 5.5 * 30, 20 + 2.5 * 30.
    assert abs(x + 0.5 - 265) <= 0.5
    assert abs(y + 0.5 - 95) <= 0.5


def test_edges_are_taken_as_float32():
    # As float64 the last column would be left out, as float32 it is in.
    edge = 2.5 + 1e-9
    assert covered_pixels(PixelBox(0, 0, edge, 1), (4, 1))[1] == slice(0, 2)
    assert covered_pixels(PixelBox(0, 0, 2.6, 1), (4, 1))[1] == slice(0, 3)


def test_a_picture_one_pixel_wide_keeps_its_map():
    # 1x5000 pixels: what the model saw is less than a pixel high, and lies between the centres of two.
    values = np.outer([0, 0.5, 1, 0], [0, 1, 0]).astype(np.float32)
    region = PixelBox(left=0, top=2499.56, right=1, bottom=2500.44)
    placed = place_map(values, region, (1, 5000))
    assert placed[2500, 0] == pytest.approx(0.75)
    assert np.count_nonzero(placed) == 1
    assert covered_pixels(region, (1, 5000)) == (slice(2500, 2501), slice(0, 1))


@pytest.mark.parametrize(
    ("start", "stop", "pixels"),
    [
        (2.6, 3.4, slice(3, 4)),
        (2.6, 2.9, slice(2, 3)),
        (3.1, 3.4, slice(3, 4)),
        (3.6, 4.3, slice(3, 4)),
        (3.7, 4.4, slice(4, 4)),
        (-0.4, 0.3, slice(0, 0)),
        (-0.3, 0.4, slice(0, 1)),
        (0.6, 1.5, slice(1, 2)),
        (2.4, 3.4, slice(2, 3)),
    ],
)
def test_a_region_between_two_centres_is_the_pixel_of_its_middle(start, stop, pixels):
    assert covered_pixels(PixelBox(start, start, stop, stop), (4, 4)) == (pixels, pixels)


def test_half_open():
    rows, columns = covered_pixels(PixelBox(0.5, 0.5, 2.5, 1.5), (4, 4))
    assert (rows, columns) == (slice(0, 1), slice(0, 2))


@pytest.mark.parametrize(
    ("values", "region", "size", "word"),
    [
        (np.zeros(3), PixelBox(0, 0, 1, 1), (2, 2), "values"),
        (np.zeros((0, 3)), PixelBox(0, 0, 1, 1), (2, 2), "values"),
        (np.zeros((2, 2)), PixelBox(1, 0, 1, 1), (2, 2), "region"),
        (np.zeros((2, 2)), PixelBox(0, 1, 1, 0), (2, 2), "region"),
        (np.zeros((2, 2)), PixelBox(0, 0, float("nan"), 1), (2, 2), "region"),
        (np.zeros((2, 2)), PixelBox(0, 0, float("inf"), 1), (2, 2), "region"),
        (np.zeros((2, 2)), PixelBox(0, 0, 1, 1), (0, 2), "size"),
    ],
)
def test_nonsense_is_refused(values, region, size, word):
    with pytest.raises(ValueError, match=word):
        place_map(values, region, size)
