"""What methods multiply activations with. The products are summed over channels, or looked at in another way.

Shapes, dtypes and rules on tracing are those of `heatlens_server.backends.torch.cam.methods`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.precision import accumulator, at_least_float32
from heatlens_server.core.methods import Method

GRAD_CAM_PLUS_PLUS_EPSILON = 1e-6
"""Added to the denominator of the Grad-CAM++ coefficients, as in the `grad-cam` package 1.5.7."""

X_GRAD_CAM_EPSILON = 1e-7
"""Added to the sum of a channel's activations in XGrad-CAM, as in the `grad-cam` package 1.5.7."""


def grad_cam_weights(gradients: Tensor) -> Tensor:
    """Grad-CAM's weight of each channel, (N, K, C): the mean of its gradients (N, K, C, h, w)."""
    return gradients.mean(dim=(-2, -1), dtype=accumulator(gradients.dtype))


def grad_cam_plus_plus_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM++'s weight of each channel, (N, K, C); see `cam.methods.grad_cam_plus_plus`."""
    gradients = at_least_float32(gradients)
    channel_sums = at_least_float32(activations).sum(dim=(-2, -1), keepdim=True).unsqueeze(1)
    squared = gradients * gradients
    denominator = squared * (channel_sums * gradients + 2.0) + GRAD_CAM_PLUS_PLUS_EPSILON
    # Also keeps 0 / 0 away from pixels of negative gradient, whose weight is zero whatever alpha is.
    denominator = torch.where(denominator == 0, 1.0, denominator)
    return (squared / denominator * torch.relu(gradients)).sum(dim=(-2, -1))


def x_grad_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM's weight of each channel, (N, K, C); see `heatlens_server.backends.torch.cam.methods.x_grad_cam`."""
    activations = at_least_float32(activations)
    channel_sums = activations.sum(dim=(-2, -1)).unsqueeze(1) + X_GRAD_CAM_EPSILON
    return (at_least_float32(gradients) * activations.unsqueeze(1)).sum(dim=(-2, -1)) / channel_sums


def shapley_cam_weights(gradients: Tensor, curvature: Tensor) -> Tensor:
    """Shapley-CAM's weight of each channel, (N, K, C): the mean of `g - H A / 2`, both (N, K, C, h, w)."""
    return (at_least_float32(gradients) - 0.5 * at_least_float32(curvature)).mean(dim=(-2, -1))


def weigh(weights: Tensor, activations: Tensor) -> Tensor:
    """Multiply channels with weights and keep them apart.

    Args:
        weights: (N, K, C).
        activations: (N, C, h, w).

    Returns:
        (N, K, C, h, w), float32 or wider: its sum over C is the map of a method that weights channels.
    """
    return at_least_float32(weights)[..., None, None] * at_least_float32(activations).unsqueeze(1)


def gradient_times_activation(activations: Tensor, gradients: Tensor) -> Tensor:
    """`g A` at every pixel, (N, K, C, h, w), float32 or wider: its sum over C is HiResCAM."""
    return at_least_float32(gradients) * at_least_float32(activations).unsqueeze(1)


def _by_channel(weights: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda activations, factors: weigh(weights(activations, factors), activations)


WEIGHTED_ACTIVATIONS: Mapping[Method, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        Method.CAM: _by_channel(lambda _, class_weights: class_weights),
        Method.GRAD_CAM: _by_channel(lambda _, gradients: grad_cam_weights(gradients)),
        Method.GRAD_CAM_PLUS_PLUS: _by_channel(grad_cam_plus_plus_weights),
        Method.HI_RES_CAM: gradient_times_activation,
        Method.X_GRAD_CAM: _by_channel(x_grad_cam_weights),
        Method.LAYER_CAM: lambda activations, gradients: gradient_times_activation(activations, torch.relu(gradients)),
        Method.ELEMENT_WISE_GRAD_CAM: lambda activations, gradients: torch.relu(
            gradient_times_activation(activations, gradients)
        ),
    }
)


def weighted(method: Method, activations: Tensor, factors: Tensor) -> Tensor:
    """Weight activations as a closed form does, without summing them: what principal-component smoothing projects.

    Args:
        method: a closed form that `weights_activations`.
        activations: (N, C, h, w).
        factors: the gradients (N, K, C, h, w); for `Method.CAM` the class weights (N, K, C).

    Returns:
        (N, K, C, h, w), float32 or wider, whose sum over C is `cam.methods.raw_map`.
    """
    return WEIGHTED_ACTIVATIONS[method](activations, factors)
