"""An image's own values become 0 to 255, of the model's channels."""

import dataclasses

import numpy as np
import pytest
from PIL import Image
from skimage import data

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.imaging.levels import SourcePixels, levels_of

PHOTO = data.chelsea()


def spec(channels=3, **changes):
    base = PreprocessSpec(
        resize_px=8,
        crop_px=(8, 8),
        mean=(0.5,) * channels,
        std=(0.5,) * channels,
        interpolation=Interpolation.BILINEAR,
    )
    return dataclasses.replace(base, **changes)


def source(values, **changes):
    highest = {"u1": 255.0, "u2": 65_535.0, "f4": 1.0}.get(values.dtype.str[1:])
    return SourcePixels(values, **{"field": "image.encoded", "highest": highest} | changes)


def gray(values):
    return np.asarray(values)[:, :, None]


def test_8_bits_stay_as_they_are_without_a_copy():
    values, warnings = levels_of(source(PHOTO), spec())
    assert values is PHOTO
    assert warnings == ()


def test_gray_is_pillows_luma():
    values, _ = levels_of(source(PHOTO), spec(1))
    assert values.dtype == np.uint8
    difference = values[:, :, 0].astype(int) - np.asarray(Image.fromarray(PHOTO).convert("L"))
    assert np.abs(difference).max() <= 1
    assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_gray_becomes_rgb_and_gray_again(dtype):
    values = (gray(PHOTO[:, :, 0]) / (255 if dtype == np.float32 else 1)).astype(dtype)
    as_rgb, _ = levels_of(source(values), spec(3))
    assert as_rgb.shape == PHOTO.shape
    again, _ = levels_of(source(np.repeat(values, 3, axis=2)), spec(1))
    np.testing.assert_allclose(again[:, :, 0], as_rgb[:, :, 2], atol=1e-4)


def test_alpha_is_dropped_where_the_model_has_no_use_for_it():
    with_alpha = np.dstack([PHOTO, np.zeros(PHOTO.shape[:2], np.uint8)])
    np.testing.assert_array_equal(levels_of(source(with_alpha), spec(3))[0], PHOTO)
    np.testing.assert_array_equal(levels_of(source(with_alpha), spec(4))[0], with_alpha)
    np.testing.assert_array_equal(levels_of(source(with_alpha), spec(1))[0], levels_of(source(PHOTO), spec(1))[0])


@pytest.mark.parametrize(("own", "channels"), [(3, 4), (1, 2), (3, 5), (2, 1), (5, 3)])
def test_other_channels_are_refused(own, channels):
    with pytest.raises(
        InvalidArgument, match=f"the model takes {channels} channels, and the image has {own}"
    ) as caught:
        levels_of(source(np.zeros((4, 4, own), np.uint8)), spec(channels))
    assert caught.value.reason == "IMAGE_CHANNELS_MISMATCH"
    assert caught.value.violations[0].field == "image.encoded"


def test_16_bits_keep_their_precision():
    values = gray(np.array([[0, 257, 300, 65_535]], np.uint16))
    levels, warnings = levels_of(source(values), spec(1))
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels[0, :, 0], [0.0, 1.0, 300 / 257, 255.0], rtol=1e-6)
    assert warnings == ()


def test_12_bits_in_a_file_of_16_are_as_8_bits_with_a_window_and_a_warning_without():
    values = PHOTO.astype(np.uint16) * 16
    levels, warnings = levels_of(source(values), spec(window=(0.0, 4080.0)))
    np.testing.assert_allclose(levels, PHOTO, atol=1e-4)
    assert warnings == ()
    levels, (warning,) = levels_of(source(values), spec())
    assert levels.max() < 16
    most = int(values.max())
    assert f"uses {most} of 65535 values" in warning
    assert "set window of [models.preprocess]" in warning
    levels, warnings = levels_of(source(values), spec(window_auto=True))
    assert (levels.min(), levels.max()) == (0.0, 255.0)
    assert warnings == ()


def test_fewer_bits_by_the_file_are_its_range():
    values = gray(np.array([[0, 4095]], np.uint16))
    levels, _ = levels_of(source(values, highest=4095.0, warnings=("12 bits",)), spec(1))
    np.testing.assert_allclose(levels[0, :, 0], [0.0, 255.0])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16, np.float32])
def test_a_window_is_cut_at_its_ends(dtype):
    low, high = (20, 120) if dtype == np.uint16 else (-160, 240)
    values = gray(np.array([[low - 15, low, (low + high) / 2, high, high + 900]]).astype(dtype))
    levels, _ = levels_of(source(values, highest=None), spec(1, window=(float(low), float(high))))
    np.testing.assert_allclose(levels[0, :, 0], [0, 0, 127.5, 255, 255], atol=1e-4)


def test_the_configuration_wins_over_the_files_window():
    values = gray(np.array([[0, 50, 100]], np.int16))
    own = source(values, highest=None, window=(0.0, 100.0))
    assert levels_of(own, spec(1))[0][0, 1, 0] == 127.5
    assert levels_of(own, spec(1, window=(0.0, 50.0)))[0][0, 1, 0] == 255.0


def test_an_image_of_one_value_is_black_by_its_own_window():
    levels, _ = levels_of(source(np.full((2, 2, 1), 7, np.uint16)), spec(1, window_auto=True))
    np.testing.assert_array_equal(levels, 0.0)


@pytest.mark.parametrize(
    ("values", "changes", "words"),
    [
        (np.array([[0.0, 1.5]]), {}, r"\[0, 1\], got values from 0 to 1.5: set window"),
        (np.array([[-0.1, 1.0]]), {}, "got values from -0.1"),
        (np.array([[np.nan, 1.0]]), {}, "finite"),
        (np.array([[np.inf, 1.0]]), {"window": (0.0, 1.0)}, "finite"),
        (np.array([[np.nan, 1.0]]), {"window_auto": True}, "finite"),
    ],
)
def test_floats_without_a_range_are_refused(values, changes, words):
    floats = gray(values.astype(np.float32))
    with pytest.raises(InvalidArgument, match=words) as caught:
        levels_of(source(floats, field="image.pixels.data"), spec(1, **changes))
    assert caught.value.reason == "IMAGE_RANGE_UNKNOWN"
    assert caught.value.violations[0].field == "image.pixels.data"


def test_signed_values_without_a_window_are_refused():
    with pytest.raises(InvalidArgument, match=r'int16 values have no range of their own: set window .* "auto"'):
        levels_of(source(gray(np.array([[1]], np.int16)), highest=None), spec(1))


@pytest.mark.parametrize(
    ("values", "window", "count"),
    [
        (np.uint8([[200]]), (0.0, 4095.0), 1),
        (np.uint8([[200]]), (0.0, 255.0), 0),
        (np.uint8([[200]]), (0.0, 800.0), 0),
        (np.uint16([[200]]), (0.0, 4095.0), 0),
        (np.float32([[0.5]]), (-1000.0, 1000.0), 0),
        (np.float32([[0.5]]), (0.0, 4095.0), 1),
    ],
)
def test_an_image_of_fewer_bits_than_the_models_window_is_for_gets_a_warning(values, window, count):
    highest = {"u": np.iinfo(values.dtype).max if values.dtype.kind == "u" else 0, "f": 1.0}[values.dtype.kind]
    _levels, warnings = levels_of(source(gray(values), highest=float(highest)), spec(1, window=window))
    assert len(warnings) == count
    assert all("dark to the model" in warning for warning in warnings)


def test_a_narrow_window_far_from_0_keeps_its_steps():
    values = gray(np.array([[10**9, 10**9 + 50, 10**9 + 100]], np.int32))
    levels, _ = levels_of(source(values, highest=None), spec(1, window=(1e9, 1e9 + 100)))
    np.testing.assert_allclose(levels[0, :, 0], [0.0, 127.5, 255.0])


def test_values_beyond_float32_are_beyond_the_window():
    values = gray(np.array([[-1e300, 5.0, 1e300]]))
    levels, _ = levels_of(source(values, highest=None, window=(0.0, 10.0)), spec(1))
    np.testing.assert_allclose(levels[0, :, 0], [0.0, 127.5, 255.0])


@pytest.mark.parametrize("window", [(0.0, 1e300), (-1e308, 1e308), (0.0, 1e-40)])
def test_a_window_that_float32_lacks_is_refused(window):
    with pytest.raises(InvalidArgument, match="the window from") as caught:
        levels_of(source(gray(np.zeros((2, 2))), highest=None, window=window), spec(3))
    assert caught.value.reason == "IMAGE_RANGE_UNKNOWN"
