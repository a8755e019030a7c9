"""Masks and vectors of requests: what is read, what is refused, and which pixels a mask means after the crop."""

import dataclasses

import numpy as np
import pytest

from heatlens import PixelBox
from heatlens._results import geometry
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.imaging.mask import OUTSIDE, fit_mask, mask_from_tensor, place_mask, vector_from_tensor
from heatlens_server.imaging.preprocess import fit

SPEC = PreprocessSpec(resize_px=8, crop_px=(8, 8), mean=(0, 0, 0), std=(1, 1, 1), interpolation=Interpolation.NEAREST)


def read(**changes):
    given = {"data_type": "UINT8", "shape": (2, 3), "data": b"\0\1\2\3\0\0", "max_pixels": 6}
    return mask_from_tensor(**given | changes)


def test_every_pixel_but_zero_counts():
    np.testing.assert_array_equal(read(), [[False, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("changes", "field", "reason"),
    [
        ({"data_type": "FLOAT32"}, "mask.data_type", "TENSOR_TYPE_UNSUPPORTED"),
        ({"shape": (2, 3, 1)}, "mask.shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (0, 3)}, "mask.shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": range(100_000)}, "mask.shape", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (2, 2)}, "mask.data", "TENSOR_SIZE_MISMATCH"),
        ({"shape": (2**40, 2**40)}, "mask.shape", "IMAGE_TOO_LARGE"),
        ({"max_pixels": 5}, "mask.shape", "IMAGE_TOO_LARGE"),
    ],
)
def test_masks_that_are_none(changes, field, reason):
    with pytest.raises(InvalidArgument) as raised:
        read(**changes)
    assert ([violation.field for violation in raised.value.violations], raised.value.reason) == ([field], reason)
    assert len(raised.value.message) < 300


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ([1, 2], "reference_embedding.shape"),
        ([0, 0, 0], "reference_embedding.data"),
        ([1, np.nan, 0], "reference_embedding.data"),
        ([np.inf, 0, 0], "reference_embedding.data"),
    ],
)
def test_embeddings_that_cannot_be_compared_with(values, field):
    data = np.array(values, "<f4").tobytes()
    with pytest.raises(InvalidArgument) as raised:
        vector_from_tensor(data_type="FLOAT32", shape=(len(values),), data=data, length=3)
    assert [violation.field for violation in raised.value.violations] == [field]


def test_an_embedding_may_be_a_batch_of_one():
    data = np.array([1, 2, 3], "<f4").tobytes()
    for shape in ((3,), (1, 3)):
        assert vector_from_tensor(data_type="FLOAT32", shape=shape, data=data, length=3).tolist() == [1, 2, 3]
    for shape in ((3, 1), (1, 1, 3)):
        with pytest.raises(InvalidArgument):
            vector_from_tensor(data_type="FLOAT32", shape=shape, data=data, length=3)


def painted(mask):
    """The mask as a picture."""
    return np.repeat(np.where(mask, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


def test_a_mask_of_an_image_that_is_enlarged_goes_its_way():
    mask = np.random.default_rng(0).random((5, 7)) < 0.3
    fitted = fit(painted(mask), SPEC)
    np.testing.assert_array_equal(fit_mask(mask, fitted), fitted.pixels[..., 0] == 255)


@pytest.mark.parametrize("shape", [(24, 40), (9, 17), (23, 30), (101, 8), (8, 101), (8, 8)])
def test_no_pixel_that_the_model_sees_is_lost_when_an_image_is_shrunk(shape):
    """Each seen pixel alone is in one input pixel: the one that `place_mask` puts there. Masks add up."""
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < 0.1
    fitted = fit(painted(mask), SPEC)
    sources = place_mask(np.arange(64, dtype=np.uint8).reshape(8, 8), fitted)
    wanted = np.zeros(64, bool)
    wanted[sources[mask & (sources != OUTSIDE)]] = True
    np.testing.assert_array_equal(fit_mask(mask, fitted).ravel(), wanted)
    nearest = fitted.pixels[..., 0] == 255
    assert (fit_mask(mask, fitted) | ~nearest).all()


@pytest.mark.parametrize("place", range(12, 36))
def test_a_line_of_one_pixel_is_not_empty(place):
    fitted = fit(np.zeros((24, 48, 3), np.uint8), SPEC)
    mask = np.zeros((24, 48), bool)
    mask[:, place] = True
    found = fit_mask(mask, fitted)
    np.testing.assert_array_equal(np.flatnonzero(found.all(axis=0)), [(place - 12) // 3])
    assert found.sum() == 8


def test_a_mask_must_be_of_the_image_and_meet_what_the_model_sees():
    fitted = fit(np.zeros((24, 48, 3), np.uint8), SPEC)
    with pytest.raises(InvalidArgument, match="24x48") as raised:
        fit_mask(np.ones((48, 24), bool), fitted)
    assert raised.value.reason == "MASK_SIZE_MISMATCH"
    outside = np.zeros((24, 48), bool)
    outside[:, :12] = True  # the centre crop leaves out 12 columns on either side
    with pytest.raises(InvalidArgument) as raised:
        fit_mask(outside, fitted)
    assert raised.value.reason == "MASK_EMPTY"


def test_a_predicted_mask_is_placed_where_the_model_looked():
    fitted = fit(np.zeros((24, 48, 3), np.uint8), SPEC)
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
    placed = place_mask(mask, fitted)
    assert (placed[:, :12] == OUTSIDE).all()
    assert (placed[:, 36:] == OUTSIDE).all()
    np.testing.assert_array_equal(placed[:, 12:36], np.repeat(np.repeat(mask, 3, 0), 3, 1))


@pytest.mark.parametrize("shape", [(24, 48), (9, 17), (23, 30), (101, 8), (8, 101), (8, 8), (1, 90)])
def test_client_and_server_place_masks_alike(shape):
    fitted = fit(np.zeros((*shape, 3), np.uint8), SPEC)
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8)
    region = PixelBox(fitted.region.left, fitted.region.top, fitted.region.right, fitted.region.bottom)
    np.testing.assert_array_equal(geometry.place_mask(mask, region, shape[::-1]), place_mask(mask, fitted))
    assert geometry.NOT_SEEN == OUTSIDE


@pytest.mark.parametrize("interpolation", [Interpolation.NEAREST, Interpolation.BILINEAR])
@pytest.mark.parametrize(("height_px", "width_px"), [(4, 8), (40, 80), (8, 4), (60, 30)])
def test_a_mask_in_a_letterbox_is_on_the_image_alone(interpolation, height_px, width_px):
    boxed = dataclasses.replace(SPEC, resize_px=(8, 8), letterbox=True, interpolation=interpolation)
    image = fit(np.full((height_px, width_px, 3), 255, np.uint8), boxed)
    on_image = image.pixels[..., 0] == 255
    assert 0.4 < on_image.mean() < 0.6
    np.testing.assert_array_equal(fit_mask(np.ones((height_px, width_px), bool), image), on_image)
    placed = place_mask(on_image.astype(np.uint8), image)
    assert (placed == 1).all()
