"""What is done with arrays of numbers: the same in numpy as in torch."""

import cv2
import numpy as np
import pytest
import torch

from heatlens_server.maps.concrete import as_numpy, upsample


def drawn(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("size", [(9, 16), (224, 224), (7, 50), (3, 2), (1, 1)])
@pytest.mark.parametrize("given", [(7, 7), (1, 5), (3, 4)])
def test_maps_are_upsampled_as_by_torch(given, size):
    maps = drawn(2, 3, *given)
    found = upsample(maps, size)
    np.testing.assert_allclose(found, upsample(torch.from_numpy(maps), size).numpy(), atol=1e-12)
    single = upsample(maps.astype(np.float32), size)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, found, atol=1e-5)


def test_maps_are_upsampled_as_by_opencv():
    maps = drawn(1, 1, 7, 5).astype(np.float32)
    expected = cv2.resize(maps[0, 0], (64, 48), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(upsample(maps, (48, 64))[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_maps_of_the_size_wanted_are_left_alone(make):
    maps = make(drawn(1, 2, 4, 5))
    assert upsample(maps, (4, 5)) is maps


@pytest.mark.parametrize(("shape", "size", "message"), [((3, 4), (3, 4), "maps"), ((1, 1, 2, 2), (0, 4), "size")])
def test_what_does_not_fit_is_refused(shape, size, message):
    with pytest.raises(ValueError, match=message):
        upsample(drawn(*shape), size)


def test_what_is_on_the_host_is_not_copied():
    tensor = torch.zeros(3)
    as_numpy(tensor)[1] = 2.0
    assert tensor.tolist() == [0.0, 2.0, 0.0]
