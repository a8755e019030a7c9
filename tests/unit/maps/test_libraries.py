"""Every method says the same of numpy's arrays as of torch's, in every precision."""

import numpy as np
import pytest
import torch

from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.maps.methods import raw_map, smooth_grad_cam_plus_plus
from heatlens_server.maps.normalization import normalize
from heatlens_server.maps.principal import principal_projection
from heatlens_server.maps.weights import WEIGHTED_ACTIVATIONS, weighted
from layer_cases import CASES, factors_of, layer_case


def assert_close(actual, expected, tolerance):
    assert actual.shape == tuple(expected.shape)
    assert np.abs(actual - np.asarray(expected)).max() <= tolerance * max(np.abs(np.asarray(expected)).max(), 1e-300)


def each_case(method, dtype=np.float64):
    """Activations and factors of every kind and shape."""
    for shape, kind in CASES:
        activations, gradients = (values.astype(dtype) for values in layer_case(shape, kind))
        yield activations, factors_of(method, gradients)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_numpy_is_torch_in_float64(method):
    for activations, factors in each_case(method):
        check_numpy_is_torch(method, activations, factors)


def check_numpy_is_torch(method, activations, factors):
    actual = raw_map(method, activations, factors)
    expected = raw_map(method, torch.from_numpy(activations), torch.from_numpy(factors))
    assert actual.dtype == np.float64
    assert_close(actual, expected, 1e-12)
    ours, theirs = normalize(actual), normalize(torch.from_numpy(actual.copy()))
    for name in ("values", "scale", "offset"):
        assert_close(getattr(ours, name), getattr(theirs, name), 0)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_every_class_of_every_image_has_a_map(method):
    """Zeros would agree with anything."""
    activations, gradients = layer_case((2, 3, 16, 7, 7))
    assert raw_map(method, activations, factors_of(method, gradients)).any(axis=(2, 3)).all()


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_float32_stays_and_is_near_float64(method):
    for activations, factors in each_case(method, np.float32):
        check_float32_stays(method, activations, factors)


def check_float32_stays(method, activations, factors):
    actual = raw_map(method, activations, factors)
    assert actual.dtype == np.float32
    finished = normalize(actual)
    assert finished.values.dtype == finished.scale.dtype == finished.offset.dtype == np.float32
    # Of components float32 knows what their distance allows; a cancelled sum of channels is a few of its roundings.
    assert_close(actual, raw_map(method, activations.astype(float), factors.astype(float)), 5e-5)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_float16_accumulates_in_float32(method):
    # Sums over 2048 channels and products of small gradients: neither fits float16.
    activations, gradients = (values.astype(np.float16) for values in layer_case((2, 2, 2048, 7, 7)))
    factors = factors_of(method, gradients)
    actual = raw_map(method, activations, factors)
    assert actual.dtype == normalize(actual.astype(np.float16)).values.dtype == np.float32
    assert_close(actual, raw_map(method, activations.astype(float), factors.astype(float)), 1e-4)


@pytest.mark.parametrize("method", WEIGHTED_ACTIVATIONS)
def test_components_of_weighted_activations(method):
    activations, gradients = layer_case((2, 3, 16, 7, 7))
    factors = factors_of(method, gradients)
    products = weighted(method, activations, factors)
    assert_close(products.sum(axis=2), raw_map(method, activations, factors), 1e-12)
    expected = principal_projection(weighted(method, torch.from_numpy(activations), torch.from_numpy(factors)))
    assert_close(principal_projection(products), expected, 1e-9)


def test_smooth_grad_cam_plus_plus():
    activations, gradients = layer_case((2, 3, 16, 7, 7))
    powers = [gradients**power for power in (1, 2, 3)]
    expected = smooth_grad_cam_plus_plus(*(torch.from_numpy(values) for values in (activations, *powers)))
    assert_close(smooth_grad_cam_plus_plus(activations, *powers), expected, 1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_what_is_not_finite_reaches_the_map_without_a_warning(method, bad):
    """Warnings are errors here."""
    activations, gradients = layer_case((3, 2, 16, 7, 7))
    activations[1, 0, 2, 2] = bad
    maps = raw_map(method, activations, factors_of(method, gradients))
    assert not np.isfinite(maps[1]).all()
    assert np.isfinite(maps[[0, 2]]).all()
    assert np.isfinite(normalize(maps).values[[0, 2]]).all()


def test_inputs_stay_as_they_were():
    activations, gradients = layer_case((2, 3, 16, 7, 7), "signed")
    before = activations.copy(), gradients.copy()
    for method in CLOSED_FORMS:
        normalize(raw_map(method, activations, factors_of(method, gradients)))
    assert np.array_equal(before[0], activations)
    assert np.array_equal(before[1], gradients)


def test_channels_last_and_read_only():
    activations, gradients = layer_case((2, 3, 16, 7, 7))
    gradients.flags.writeable = False
    last = np.ascontiguousarray(activations.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    for method in CLOSED_FORMS:
        factors = factors_of(method, gradients)
        assert_close(raw_map(method, last, factors), raw_map(method, activations, factors), 1e-12)


def test_methods_are_asked_for_by_shape():
    with pytest.raises(ValueError, match=r"gradients: must be \(2, K, 3, 5, 4\) .*, not \(2, 3, 5, 4\)"):
        raw_map(Method.GRAD_CAM, np.zeros((2, 3, 5, 4)), np.zeros((2, 3, 5, 4)))
