"""Smooth Grad-CAM++: the powers of gradients at noisy inputs, averaged.

Arguments, results, errors and rules on dtypes and tracing are those of `cam.methods`, where not told otherwise.
"""

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.methods import cam
from heatlens_server.backends.torch.cam.precision import wide
from heatlens_server.backends.torch.cam.weights import GRAD_CAM_PLUS_PLUS_EPSILON


def smooth_grad_cam_plus_plus(activations: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Smooth Grad-CAM++: Grad-CAM++ with the means of g, g^2 and g^3 over noisy inputs in the place of each.

    Channels are weighted by `sum_ij alpha[c] relu(E g[c])`, `alpha = E g^2 / (2 E g^2 + (sum_ij A[c]) E g^3 + eps)`.
    Omeiza et al. 2019, https://arxiv.org/abs/1908.01224, with Grad-CAM++'s own numerator (the paper prints the first
    derivative there, as `torch-cam` 0.5.0 notes too) and this house's Grad-CAM++ variant and eps, so that without noise
    it is Grad-CAM++. `torch-cam` takes relu(g) of its last noisy input alone, and `sum_ij (A[c] g^3)`.

    Args:
        activations: (N, C, h, w), for the inputs without noise.
        first: (N, K, C, h, w), the mean of g over the noisy inputs.
        second: (N, K, C, h, w), the mean of g^2.
        third: (N, K, C, h, w), the mean of g^3.
    """
    if not first.shape == second.shape == third.shape or first.ndim != 5 or first.shape[2:] != activations.shape[1:]:
        raise ValueError(
            f"first, second, third: must all be (N, K, {', '.join(map(str, activations.shape[1:]))}), "
            f"not {[tuple(power.shape) for power in (first, second, third)]}"
        )
    second = wide(second)
    channel_sums = wide(activations).sum(dim=(-2, -1), keepdim=True).unsqueeze(1)
    denominator = 2.0 * second + channel_sums * wide(third) + GRAD_CAM_PLUS_PLUS_EPSILON
    # As in Grad-CAM++: takes negative activations.
    denominator = torch.where(denominator == 0, 1.0, denominator)
    weights = (second / denominator * torch.relu(wide(first))).sum(dim=(-2, -1))
    return cam(activations, weights)
