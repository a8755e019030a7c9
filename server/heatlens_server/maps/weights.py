"""What methods multiply activations with. The products are summed over channels, or looked at in another way.

Shapes, dtypes and rules on tracing are those of `maps.methods`.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from heatlens_server.core.methods import Method
from heatlens_server.maps.arrays import A, mean_places, namespace, nonzero, relu, silently, sum_places
from heatlens_server.maps.precision import accumulator, at_least_float32

GRAD_CAM_PLUS_PLUS_EPSILON = 1e-6
"""Added to the denominator of the Grad-CAM++ coefficients, as in the `grad-cam` package 1.5.7."""

X_GRAD_CAM_EPSILON = 1e-7
"""Added to the sum of a channel's activations in XGrad-CAM, as in the `grad-cam` package 1.5.7."""


def grad_cam_weights(gradients: A) -> A:
    """Grad-CAM's weight of each channel, (N, K, C): the mean of its gradients (N, K, C, h, w)."""
    return mean_places(gradients, dtype=accumulator(namespace(gradients), gradients.dtype))


def grad_cam_plus_plus_weights(activations: A, gradients: A) -> A:
    """Grad-CAM++'s weight of each channel, (N, K, C); see `maps.methods.grad_cam_plus_plus`."""
    xp = namespace(gradients)
    gradients = at_least_float32(gradients)
    channel_sums = xp.expand_dims(sum_places(at_least_float32(activations), keepdims=True), axis=1)
    squared = gradients * gradients
    denominator = squared * (channel_sums * gradients + 2.0) + GRAD_CAM_PLUS_PLUS_EPSILON
    # Also keeps 0 / 0 away from pixels of negative gradient, whose weight is zero whatever alpha is.
    return sum_places(squared / nonzero(denominator) * relu(gradients))


def smooth_grad_cam_plus_plus_weights(activations: A, first: A, second: A, third: A) -> A:
    """Smooth Grad-CAM++'s weight of each channel, (N, K, C); see `maps.methods.smooth_grad_cam_plus_plus`."""
    xp = namespace(activations)
    second = at_least_float32(second)
    channel_sums = xp.expand_dims(sum_places(at_least_float32(activations), keepdims=True), axis=1)
    denominator = 2.0 * second + channel_sums * at_least_float32(third) + GRAD_CAM_PLUS_PLUS_EPSILON
    # As in Grad-CAM++: takes negative activations.
    return sum_places(second / nonzero(denominator) * relu(at_least_float32(first)))


def x_grad_cam_weights(activations: A, gradients: A) -> A:
    """XGrad-CAM's weight of each channel, (N, K, C); see `maps.methods.x_grad_cam`."""
    # Once: half precision would be widened again by what multiplies it.
    activations = at_least_float32(activations)
    channel_sums = namespace(activations).expand_dims(sum_places(activations), axis=1)
    return sum_places(gradient_times_activation(activations, gradients)) / (channel_sums + X_GRAD_CAM_EPSILON)


def shapley_cam_weights(gradients: A, curvature: A) -> A:
    """Shapley-CAM's weight of each channel, (N, K, C): the mean of `g - H A / 2`, both (N, K, C, h, w)."""
    return mean_places(at_least_float32(gradients) - 0.5 * at_least_float32(curvature))


def weigh(weights: A, activations: A) -> A:
    """Multiply channels with weights and keep them apart.

    Args:
        weights: (N, K, C).
        activations: (N, C, h, w).

    Returns:
        (N, K, C, h, w), float32 or wider: its sum over C is the map of a method that weights channels.
    """
    xp = namespace(weights)
    spread = xp.expand_dims(at_least_float32(weights), axis=(-2, -1))
    return spread * xp.expand_dims(at_least_float32(activations), axis=1)


def gradient_times_activation(activations: A, gradients: A) -> A:
    """`g A` at every pixel, (N, K, C, h, w), float32 or wider: its sum over C is HiResCAM."""
    return at_least_float32(gradients) * namespace(activations).expand_dims(at_least_float32(activations), axis=1)


def _by_channel(weights: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda activations, factors: weigh(weights(activations, factors), activations)


WEIGHTED_ACTIVATIONS: Mapping[Method, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        Method.CAM: _by_channel(lambda _, class_weights: class_weights),
        Method.GRAD_CAM: _by_channel(lambda _, gradients: grad_cam_weights(gradients)),
        Method.GRAD_CAM_PLUS_PLUS: _by_channel(grad_cam_plus_plus_weights),
        Method.HI_RES_CAM: gradient_times_activation,
        Method.X_GRAD_CAM: _by_channel(x_grad_cam_weights),
        Method.LAYER_CAM: lambda activations, gradients: gradient_times_activation(activations, relu(gradients)),
        Method.ELEMENT_WISE_GRAD_CAM: lambda activations, gradients: relu(
            gradient_times_activation(activations, gradients)
        ),
    }
)


def weighted(method: Method, activations: A, factors: A) -> A:
    """Weight activations as a closed form does, without summing them: what principal-component smoothing projects.

    Args:
        method: a closed form that `weights_activations`.
        activations: (N, C, h, w).
        factors: the gradients (N, K, C, h, w); for `Method.CAM` the class weights (N, K, C).

    Returns:
        (N, K, C, h, w), float32 or wider, whose sum over C is `maps.methods.raw_map`.
    """
    with silently():
        made: A = WEIGHTED_ACTIVATIONS[method](activations, factors)
    return made
