"""Raw class activation maps from activations and gradients, one pure function per method.

Arguments, results and errors are the same everywhere, and told here alone:

- activations `A`: (N, C, h, w), N images and C channels of the target layer;
- gradients `g`: (N, K, C, h, w), the derivative of K class scores per image with respect to the activations;
- returned: the raw map (N, K, h, w), float32 or wider, before the final ReLU;
  methods that know no class return (N, 1, h, w);
- raised: ValueError where a shape does not fit.

The arrays are torch's, numpy's, or those of another library of `maps.arrays`; what is returned is of the same one.

Half precision (float16, bfloat16) in gives float32 out and all sums run in float32: 49 products of small gradients
underflow in float16, and a sum over 2048 channels loses most of bfloat16's 8 bits. float32 stays float32; float64 stays
float64, and does not mix with others.
On CUDA, matrix products follow torch's float32 matmul precision, which is full float32 unless the caller lowers it.
Nothing here depends on the data, writes to its inputs or leaves their device, so every function can be traced.
Non-finite values are not filtered: they reach the map.

A weighted sum with one weight per channel is a matrix product, (K, C) @ (C, h*w). A sum over channels whose weights
differ per pixel is not: as an einsum it is 4 to 20 times slower on a CPU than a product and a sum, whose
intermediate is no larger than the gradients themselves.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from heatlens_server.core.methods import Method
from heatlens_server.maps.activation_maps import fem, random_cam
from heatlens_server.maps.arrays import A, Array, namespace, places_flat, product, relu, silently, sum_channels
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.principal import eigen_cam, eigen_grad_cam, kpca_cam
from heatlens_server.maps.weights import (
    grad_cam_plus_plus_weights,
    grad_cam_weights,
    gradient_times_activation,
    shapley_cam_weights,
    smooth_grad_cam_plus_plus_weights,
    x_grad_cam_weights,
)


def cam(activations: A, class_weights: A) -> A:
    """CAM: channels weighted by a linear head's weights, `sum_c W[k, c] A[c]`.

    Zhou et al. 2016, https://arxiv.org/abs/1512.04150, equation 2. For a network that ends in global average pooling
    and one linear layer only; there it equals h*w times Grad-CAM. The paper's form: no bias.

    Args:
        activations: (N, C, h, w), the input of the global average pooling.
        class_weights: (N, K, C), the rows of the head's weight that belong to the wanted classes.
    """
    _check_activations(activations)
    n, c = activations.shape[:2]
    if class_weights.ndim != 3 or class_weights.shape[0] != n or class_weights.shape[2] != c:
        raise ValueError(
            f"class_weights: must be ({n}, K, {c}) for activations {tuple(activations.shape)}, "
            f"not {tuple(class_weights.shape)}"
        )
    return _weighted_sum(class_weights, activations)


def grad_cam(activations: A, gradients: A) -> A:
    """Grad-CAM: channels weighted by their mean gradient, `sum_c mean_ij(g[c]) A[c]`.

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391, equations 1 and 2.
    """
    _check(activations, gradients)
    return _weighted_sum(grad_cam_weights(gradients), activations)


def grad_cam_plus_plus(activations: A, gradients: A) -> A:
    """Grad-CAM++: channels weighted by `sum_ij alpha[c] relu(g[c])`, `alpha = g^2 / (2 g^2 + (sum_ij A[c]) g^3 + eps)`.

    Chattopadhyay et al. 2018, https://arxiv.org/abs/1710.11063, equations 7 and 19. Implementations disagree. This is
    the paper's `(sum A) g^3` with absolute eps 1e-6 as in the `grad-cam` package 1.5.7, and without the factor
    exp(score); others use `sum(A g^3)` or another eps, which gives visibly different maps for large gradients. Where
    the denominator is exactly zero (it takes negative activations) alpha is g^2 instead of infinite.
    """
    _check(activations, gradients)
    return _weighted_sum(grad_cam_plus_plus_weights(activations, gradients), activations)


def hi_res_cam(activations: A, gradients: A) -> A:
    """HiResCAM: gradient times activation at every pixel, `sum_c g[c] A[c]`.

    Draelos and Carin 2020, https://arxiv.org/abs/2011.08891.
    """
    _check(activations, gradients)
    return sum_channels(gradient_times_activation(activations, gradients))


def x_grad_cam(activations: A, gradients: A) -> A:
    """XGrad-CAM: channels weighted by their gradient at the mean activation, `sum_ij(g[c] A[c]) / (sum_ij A[c] + eps)`.

    Fu et al. 2020, https://arxiv.org/abs/2008.02312, equation 8. eps is 1e-7 on the sum of the channel, as in the
    `grad-cam` package 1.5.7. Where a layer's activations take both signs a channel's sum may be close to zero and its
    weight huge: that is the method, not rounding.
    """
    _check(activations, gradients)
    return _weighted_sum(x_grad_cam_weights(activations, gradients), activations)


def layer_cam(activations: A, gradients: A) -> A:
    """LayerCAM: positive gradient times activation at every pixel, `sum_c relu(g[c]) A[c]`.

    Jiang et al. 2021, https://doi.org/10.1109/TIP.2021.3089943, equations 6 and 7.
    """
    _check(activations, gradients)
    return sum_channels(gradient_times_activation(activations, relu(gradients)))


def element_wise_grad_cam(activations: A, gradients: A) -> A:
    """Element-wise Grad-CAM: the positive part of gradient times activation, `sum_c relu(g[c] A[c])`.

    As `GradCAMElementWise` of the `grad-cam` package 1.5.7; it has no paper. Equals LayerCAM where activations
    are not negative.
    """
    _check(activations, gradients)
    return sum_channels(relu(gradient_times_activation(activations, gradients)))


def shapley_cam(activations: A, gradients: A, curvature: A) -> A:
    """Shapley-CAM: channels weighted by the mean of `g - H A / 2`, the gradient less half its change along A.

    Cai 2025, https://arxiv.org/abs/2501.06261, as `ShapleyCAM` of the `grad-cam` package 1.5.7. No closed form: H A is
    the product of the score's Hessian with the activations, a second differentiation of the network.

    Args:
        activations: (N, C, h, w).
        gradients: (N, K, C, h, w).
        curvature: (N, K, C, h, w), H A of every class score.
    """
    _check(activations, gradients)
    if curvature.shape != gradients.shape:
        raise ValueError(f"curvature: must be {tuple(gradients.shape)} like gradients, not {tuple(curvature.shape)}")
    return _weighted_sum(shapley_cam_weights(gradients, curvature), activations)


def smooth_grad_cam_plus_plus(activations: A, first: A, second: A, third: A) -> A:
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
    return _weighted_sum(smooth_grad_cam_plus_plus_weights(activations, first, second, third), activations)


def _same_for_all(make: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """The function of a method whose map is the same for every class."""

    def repeated(activations: A, factors: A) -> A:
        of_all: A = make(activations)
        images, _, height, width = of_all.shape
        return namespace(of_all).broadcast_to(of_all, (images, factors.shape[1], height, width))

    return repeated


RAW_MAPS: Mapping[Method, Callable[[Any, Any], Any]] = MappingProxyType(
    {
        Method.CAM: cam,
        Method.GRAD_CAM: grad_cam,
        Method.GRAD_CAM_PLUS_PLUS: grad_cam_plus_plus,
        Method.HI_RES_CAM: hi_res_cam,
        Method.X_GRAD_CAM: x_grad_cam,
        Method.LAYER_CAM: layer_cam,
        Method.ELEMENT_WISE_GRAD_CAM: element_wise_grad_cam,
        Method.EIGEN_CAM: _same_for_all(eigen_cam),
        Method.EIGEN_GRAD_CAM: eigen_grad_cam,
        Method.KPCA_CAM: _same_for_all(kpca_cam),
        Method.FEM: _same_for_all(fem),
        Method.RANDOM_CAM: lambda activations, factors: random_cam(activations, factors.shape[1]),
    }
)
"""The function of every closed form."""


def raw_map(method: Method, activations: A, factors: A) -> A:
    """Make the raw map of a method.

    Args:
        method: which one.
        activations: (N, C, h, w).
        factors: the gradients (N, K, C, h, w); for `Method.CAM`, which differentiates nothing, the class weights
            (N, K, C); for methods of activations alone anything of (N, K, ...), of which only K is read.

    Returns:
        Raw map (N, K, h, w), before the final ReLU, float32 or wider.

    Raises:
        ValueError: a shape does not fit.
    """
    with silently():
        made: A = RAW_MAPS[method](activations, factors)
    return made


def _weighted_sum(weights: A, activations: A) -> A:
    """Sum channels, (N, K, C) times (N, C, h, w) to (N, K, h, w)."""
    summed = product(at_least_float32(weights), places_flat(at_least_float32(activations)))
    return namespace(summed).reshape(summed, (*summed.shape[:2], *activations.shape[2:]))


def _check_activations(activations: Array) -> None:
    if activations.ndim != 4:
        raise ValueError(f"activations: must be (N, C, h, w), not {tuple(activations.shape)}")


def _check(activations: Array, gradients: Array) -> None:
    # Wrong shapes often broadcast: (N, C, h, w) gradients would give a map, and a wrong one.
    _check_activations(activations)
    if (
        gradients.ndim != 5
        or gradients.shape[2:] != activations.shape[1:]
        or gradients.shape[0] != activations.shape[0]
    ):
        n, c, h, w = activations.shape
        raise ValueError(
            f"gradients: must be ({n}, K, {c}, {h}, {w}) for activations {tuple(activations.shape)}, "
            f"not {tuple(gradients.shape)}"
        )
