"""Layouts: exactly what the slow and simple way gives."""

import numpy as np
import pytest

from engine_cases import MEAN, STD, noise
from heatlens_server.backends.onnx.planes import normalisation_table, normalised_planes, planes
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.imaging.preprocess import normalise


def images(count: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), dtype=np.uint8)
    pixels[0, 0, :, :] = np.arange(15).reshape(5, 3) * 17
    return pixels


@pytest.mark.parametrize("make", [lambda: images(1), lambda: images(3), lambda: images(4)[::2], lambda: noise(2)])
def test_planes_are_a_transposition(make):
    separated = planes(make())
    assert separated.flags.c_contiguous
    np.testing.assert_array_equal(separated, make().transpose(0, 3, 1, 2))


def test_looking_levels_up_is_normalising_to_the_bit():
    spec = PreprocessSpec(resize_px=8, crop_px=(8, 8), mean=MEAN, std=STD, interpolation=Interpolation.BILINEAR)
    every_level = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    for pixels in (every_level, images(3)):
        expected = np.stack([normalise(image, MEAN, STD) for image in pixels])
        np.testing.assert_array_equal(normalised_planes(pixels, normalisation_table(spec)), expected)
