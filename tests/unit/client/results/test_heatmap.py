"""Heatmaps: raw values, placement, overlays and files."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from heatlens import Heatmap, InvalidArgumentError, PixelBox, place_map
from heatlens._results.images import decode_image
from heatlens._results.overlay import color_table, colormap_names

REGION = PixelBox(2, 1, 8, 7)


@pytest.fixture
def heatmap():
    values = np.random.default_rng(3).random((3, 3), dtype=np.float32)
    return Heatmap(values=values, scale=4.0, offset=-1.0, region=REGION, placed=False)


@pytest.fixture
def image():
    return np.random.default_rng(4).integers(0, 256, (8, 10, 3), dtype=np.uint8)


def test_raw(heatmap):
    assert heatmap.raw().dtype == np.float32
    np.testing.assert_allclose(heatmap.raw(), heatmap.values * 4 - 1, rtol=1e-6)


def test_on_takes_a_size_or_an_image(heatmap, image):
    expected = place_map(heatmap.values, REGION, (10, 8))
    np.testing.assert_array_equal(heatmap.on((10, 8)), expected)
    np.testing.assert_array_equal(heatmap.on(image), expected)
    np.testing.assert_array_equal(heatmap.on(image[:, :, 0]), expected)


def test_placed_map_is_returned_as_it_is(heatmap):
    values = heatmap.on((10, 8))
    placed = Heatmap(values=values, scale=4.0, offset=-1.0, region=REGION, placed=True)
    assert placed.on((10, 8)) is values
    with pytest.raises(InvalidArgumentError, match="10x8 pixels, got 8x10"):
        placed.on((8, 10))


@pytest.mark.parametrize(
    "target",
    [(0, 3), (3, -1), (10.5, 3), (3,), (1, 2, 3), (), "x", "xx", b"xx", 3, (None, 3), np.zeros(3), np.zeros((0, 3))],
)
def test_on_nothing_is_refused(heatmap, target):
    with pytest.raises(InvalidArgumentError, match=r"target: expected \(width, height\)"):
        heatmap.on(target)


def test_on_needs_no_argument_when_the_server_said_the_size(heatmap, image):
    told = replace(heatmap, source_size=(10, 8))
    np.testing.assert_array_equal(told.on(), heatmap.on((10, 8)))
    np.testing.assert_array_equal(told.on(image), heatmap.on(image))
    np.testing.assert_array_equal(told.on([np.int64(10), 8]), heatmap.on((10, 8)))


def test_on_without_any_size_is_refused(heatmap):
    with pytest.raises(InvalidArgumentError, match="target: give the image's size"):
        heatmap.on()


def test_placed_map_knows_its_size(heatmap):
    values = heatmap.on((10, 8))
    assert replace(heatmap, values=values, placed=True).on() is values


def test_another_picture_is_refused(heatmap, image, tmp_path):
    told = replace(heatmap, source_size=(10, 8))
    turned = np.ascontiguousarray(image.swapaxes(0, 1))
    sizes = "an upright image of 10x8 pixels, got 8x10"
    for target in ((8, 10), turned):
        with pytest.raises(InvalidArgumentError, match=f"target: .*{sizes}"):
            told.on(target)
    with pytest.raises(InvalidArgumentError, match=f"image: .*{sizes}"):
        told.overlay(turned)
    with pytest.raises(InvalidArgumentError, match=f"image: .*{sizes}"):
        told.save(tmp_path / "a.png", turned)
    assert not (tmp_path / "a.png").exists()
    told.save(tmp_path / "a.png", image)


def test_a_map_one_pixel_wide_is_seen_in_its_overlay():
    values = np.outer([0, 1, 1, 0], [1, 1]).astype(np.float32)
    heatmap = Heatmap(
        values=values, scale=1.0, offset=0.0, region=PixelBox(0, 49.56, 1, 50.44), placed=False, source_size=(1, 100)
    )
    gray = np.full((100, 1, 3), 100, np.uint8)
    changed = (heatmap.overlay(gray) != gray).any(2)[:, 0]
    assert np.flatnonzero(changed).tolist() == [50]


def test_overlay_blends_inside_and_keeps_outside(heatmap, image):
    result = heatmap.overlay(image, colormap="viridis", alpha=0.25)
    placed = heatmap.on(image)
    colors = color_table("viridis")[np.rint(placed * 255).astype(np.uint8), 0]
    blended = 0.75 * image + 0.25 * colors
    inside = np.zeros((8, 10), bool)
    inside[1:7, 2:8] = True
    assert result.dtype == np.uint8
    assert np.abs(result[inside] - blended[inside]).max() <= 0.51
    np.testing.assert_array_equal(result[~inside], image[~inside])


def test_overlay_of_a_placed_map_is_the_same(heatmap, image):
    placed = Heatmap(values=heatmap.on(image), scale=1.0, offset=0.0, region=REGION, placed=True)
    np.testing.assert_array_equal(placed.overlay(image), heatmap.overlay(image))


def test_overlay_does_not_touch_its_input(heatmap, image):
    before = image.copy()
    heatmap.overlay(image, alpha=1.0)
    np.testing.assert_array_equal(image, before)


def test_alpha_zero_is_the_image(heatmap, image):
    np.testing.assert_array_equal(heatmap.overlay(image, alpha=0.0), image)


def test_overlay_takes_encoded_images(heatmap, image, tmp_path):
    encoded = cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()
    (tmp_path / "a.png").write_bytes(encoded)
    expected = heatmap.overlay(image)
    np.testing.assert_array_equal(heatmap.overlay(encoded), expected)
    np.testing.assert_array_equal(heatmap.overlay(tmp_path / "a.png"), expected)


def test_region_outside_the_image_leaves_it_alone(image):
    heatmap = Heatmap(
        values=np.ones((2, 2), np.float32), scale=1.0, offset=0.0, region=PixelBox(90, 90, 99, 99), placed=False
    )
    np.testing.assert_array_equal(heatmap.overlay(image), image)


@pytest.mark.parametrize(
    "options",
    [
        {"colormap": "nope"},
        {"colormap": 5},
        {"colormap": ["jet"]},
        {"alpha": 1.5},
        {"alpha": float("nan")},
        {"alpha": "x"},
        {"alpha": None},
    ],
)
def test_wrong_options_are_named(heatmap, image, options):
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        heatmap.overlay(image, **options)


@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_a_flat_map_is_told_and_not_drawn(heatmap, image, tmp_path, offset):
    flat = replace(heatmap, values=np.zeros((3, 3), np.float32), scale=0.0, offset=offset)
    assert flat.is_flat
    assert not heatmap.is_flat
    before = image.copy()
    drawn = flat.overlay(image, alpha=0.9)
    assert drawn is not image
    np.testing.assert_array_equal(drawn, before)
    flat.save(tmp_path / "overlay.png", image)
    np.testing.assert_array_equal(decode_image(tmp_path / "overlay.png"), before)
    # What is wrong is wrong whatever the map.
    for wrong in ({"colormap": "nope"}, {"alpha": 2}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            flat.overlay(image, **wrong)
    with pytest.raises(InvalidArgumentError, match="image: the map was made for"):
        replace(flat, source_size=(1, 1)).overlay(image)


def test_colors_are_rgb_and_every_opencv_map_works():
    # Jet is blue at 0 and red at 1.
    assert color_table("jet")[0, 0].tolist() == [0, 0, 128]
    assert color_table("JET")[255, 0].tolist() == [128, 0, 0]
    assert {"jet", "viridis", "turbo", "magma"} <= set(colormap_names())
    for name in colormap_names():
        assert color_table(name).shape == (256, 1, 3)


def test_save_npy(heatmap, image, tmp_path):
    heatmap.save(tmp_path / "a.npy")
    heatmap.save(str(tmp_path / "b.npy"), image)
    for name in ("a.npy", "b.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / name), heatmap.values)


@pytest.mark.parametrize("path", [5, "a\0.png", "a\0.npy", b"a.png", None])
def test_save_nowhere_is_refused(heatmap, path):
    with pytest.raises(InvalidArgumentError, match="path: expected a path"):
        heatmap.save(path)


def test_save_picture(heatmap, image, tmp_path):
    heatmap.save(tmp_path / "overlay.png", image, colormap="hot")
    np.testing.assert_array_equal(decode_image(tmp_path / "overlay.png"), heatmap.overlay(image, colormap="hot"))
    heatmap.save(tmp_path / "map.png")
    levels = np.rint(heatmap.values * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(tmp_path / "map.png"), color_table("jet")[levels, 0])


def test_values_are_frozen_objects(heatmap):
    with pytest.raises(AttributeError):
        heatmap.scale = 1.0
    assert "3x3" in repr(heatmap)
