"""Smooth Grad-CAM++ against its formula in loops, and against Grad-CAM++ where there is no noise."""

import pytest
import torch

from heatlens_server.backends.torch.cam.methods import grad_cam_plus_plus
from heatlens_server.backends.torch.cam.smooth import smooth_grad_cam_plus_plus

SHAPE = (2, 3, 4, 5, 6)  # N, K, C, h, w


def test_without_noise_it_is_grad_cam_plus_plus():
    generator = torch.Generator().manual_seed(0)
    activations = torch.randn(2, 4, 5, 6, generator=generator)
    gradients = torch.randn(SHAPE, generator=generator) / 10
    found = smooth_grad_cam_plus_plus(activations, gradients, gradients**2, gradients**3)
    torch.testing.assert_close(found, grad_cam_plus_plus(activations, gradients), rtol=1e-4, atol=1e-5)


def test_it_is_its_formula():
    generator = torch.Generator().manual_seed(1)
    activations = torch.rand(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    gradients = torch.randn(7, *SHAPE, generator=generator, dtype=torch.float64)
    first, second, third = (gradients.pow(power).mean(dim=0) for power in (1, 2, 3))
    found = smooth_grad_cam_plus_plus(activations, first, second, third)
    for n in range(2):
        for k in range(3):
            expected = torch.zeros(5, 6, dtype=torch.float64)
            for c in range(4):
                alpha = second[n, k, c] / (2 * second[n, k, c] + activations[n, c].sum() * third[n, k, c] + 1e-6)
                expected += (alpha * first[n, k, c].clamp(min=0)).sum() * activations[n, c]
            torch.testing.assert_close(found[n, k], expected)


def test_no_gradient_is_no_map():
    nothing = torch.zeros(1, 1, 4, 5, 6)
    assert smooth_grad_cam_plus_plus(torch.zeros(1, 4, 5, 6), nothing, nothing, nothing).eq(0).all()


def test_shapes_that_would_broadcast_are_refused():
    nothing = torch.zeros(1, 1, 4, 5, 6)
    with pytest.raises(ValueError, match="first, second, third"):
        smooth_grad_cam_plus_plus(torch.zeros(1, 4, 5, 6), nothing, nothing, nothing[:, :, :1])
    with pytest.raises(ValueError, match="first, second, third"):
        smooth_grad_cam_plus_plus(torch.zeros(1, 3, 5, 6), nothing, nothing, nothing)
