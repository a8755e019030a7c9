"""Noise by numbers."""

import numpy as np
import torch

from heatlens_server.maps.noise import standard_normal


def test_fields_are_the_same_however_they_are_drawn():
    whole = standard_normal(range(7), (3, 5), np.empty(0))
    assert whole.dtype == np.float32
    assert whole.shape == (7, 3, 5)
    np.testing.assert_array_equal(standard_normal([4, 2], (3, 5), np.empty(0)), whole[[4, 2]])
    assert len(np.unique(whole)) == whole.size


def test_torch_gets_what_numpy_gets():
    drawn = standard_normal(range(3), (4,), torch.empty(0))
    np.testing.assert_array_equal(drawn.numpy(), standard_normal(range(3), (4,), np.empty(0)))


def test_it_is_normal():
    """Of 40,000 draws: five standard errors."""
    drawn = standard_normal(range(4), (100, 100), np.empty(0)).astype(np.float64)
    assert abs(drawn.mean()) < 5 / 200
    assert abs(drawn.std() - 1) < 5 / 200 / np.sqrt(2)
