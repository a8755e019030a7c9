"""What methods multiply activations with. The products are summed over channels, or looked at in another way.

Shapes, dtypes and rules on tracing are those of `heatlens_server.backends.torch.cam.methods`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.precision import accumulator, wide
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
    gradients = wide(gradients)
    channel_sums = wide(activations).sum(dim=(-2, -1), keepdim=True).unsqueeze(1)
    squared = gradients * gradients
    denominator = squared * (channel_sums * gradients + 2.0) + GRAD_CAM_PLUS_PLUS_EPSILON
    # Also keeps 0 / 0 away from pixels of negative gradient, whose weight is zero whatever alpha is.
    denominator = torch.where(denominator == 0, 1.0, denominator)
    return (squared / denominator * torch.relu(gradients)).sum(dim=(-2, -1))


def x_grad_cam_weights(activations: Tensor, gradients: Tensor) -> Tensor:
    """XGrad-CAM's weight of each channel, (N, K, C); see `heatlens_server.backends.torch.cam.methods.x_grad_cam`."""
    activations = wide(activations)
    channel_sums = activations.sum(dim=(-2, -1)).unsqueeze(1) + X_GRAD_CAM_EPSILON
    return (wide(gradients) * activations.unsqueeze(1)).sum(dim=(-2, -1)) / channel_sums


def shapley_cam_weights(gradients: Tensor, curvature: Tensor) -> Tensor:
    """Shapley-CAM's weight of each channel, (N, K, C): the mean of `g - H A / 2`, both (N, K, C, h, w)."""
    return (wide(gradients) - 0.5 * wide(curvature)).mean(dim=(-2, -1))


def weigh(weights: Tensor, activations: Tensor) -> Tensor:
    """Multiply channels with weights and keep them apart.

    Args:
        weights: (N, K, C).
        activations: (N, C, h, w).

    Returns:
        (N, K, C, h, w), float32 or wider: its sum over C is the map of a method that weights channels.
    """
    return wide(weights)[..., None, None] * wide(activations).unsqueeze(1)


WEIGHTED_ACTIVATIONS: Mapping[Method, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {
        Method.CAM: lambda activations, class_weights: weigh(class_weights, activations),
        Method.GRAD_CAM: lambda activations, gradients: weigh(grad_cam_weights(gradients), activations),
        Method.GRAD_CAM_PLUS_PLUS: lambda activations, gradients: weigh(
            grad_cam_plus_plus_weights(activations, gradients), activations
        ),
        Method.HI_RES_CAM: lambda activations, gradients: wide(gradients) * wide(activations).unsqueeze(1),
        Method.X_GRAD_CAM: lambda activations, gradients: weigh(
            x_grad_cam_weights(activations, gradients), activations
        ),
        Method.LAYER_CAM: lambda activations, gradients: torch.relu(wide(gradients)) * wide(activations).unsqueeze(1),
        Method.ELEMENT_WISE_GRAD_CAM: lambda activations, gradients: torch.relu(
            wide(gradients) * wide(activations).unsqueeze(1)
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
