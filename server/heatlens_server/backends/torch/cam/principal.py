"""Maps that are principal components: how far every pixel's features go in the direction in which they vary most.

A layer's pixels are points in the space of its channels: X (P, C), centred over the P pixels. The map is X v for the
first right singular vector v of X, as in the `grad-cam` package: it centres too, which the first paper does not.

No format that graphs are exported to has a singular value decomposition, so v is found with matrix products: the Gram
matrix of the smaller side, X X^T or X^T X, is squared `_SQUARINGS` = 12 times, and scaled in between. That makes its
(2^12)-th power, in which a second eigenvalue of 0.9975 of the first one is left with 0.00004 of it; its columns all are
the eigenvector. Two power steps with X itself take away what rounding did meanwhile. Eigenvalues that are closer belong
to a component that rounding decides anyway: float32 knows eigenvectors to its epsilon divided by the gap.

A component has no sign of its own. Here it is fixed: see each method. Activations that do not vary give a map of zeros.
Arguments, results, errors and rules on dtypes and tracing are those of `cam.methods`, where not told otherwise.
"""

import math

import torch
from torch import Tensor

from heatlens_server.backends.torch.cam.precision import at_least_float32

_SQUARINGS = 12

_POWER_STEPS = 2

_LARGEST_SQUARED = 512
"""Pixels up to which a kernel matrix is squared: above, its products with itself take longer than any network."""

_LARGE_POWER_STEPS = 256
"""The power steps instead: a second eigenvalue of 0.95 of the first one is left with 0.002 of it."""

_FLAT = 8.0
"""Variation is rounding if its size is no more than so many times the dtype's epsilon of the activations' size."""

_KERNEL_OFFSET = 1.0
"""The sigmoid kernel's coef0, as in scikit-learn."""


def eigen_cam(activations: Tensor) -> Tensor:
    """Eigen-CAM: the first principal component of the activations, the same for every class.

    Muhammad and Yeasin 2020, https://arxiv.org/abs/2008.00299, with activations centred over the pixels as in the
    `grad-cam` package 1.5.7. Sign: correlates positively with the activations' energy, `sqrt(sum_c A[c]^2)`: networks
    respond to objects more than to background.
    """
    _check(activations)
    activations = at_least_float32(activations)
    return _component(_points(activations), _energy(activations)).reshape(-1, 1, *activations.shape[-2:])


def eigen_grad_cam(activations: Tensor, gradients: Tensor) -> Tensor:
    """Eigen-Grad-CAM: the first principal component of gradient times activation.

    As `EigenGradCAM` of the `grad-cam` package 1.5.7; it has no paper. Sign: see `principal_projection`.
    """
    _check(activations)
    if gradients.ndim != 5 or (gradients.shape[0], *gradients.shape[2:]) != activations.shape:
        raise ValueError(
            f"gradients: must be (N, K, C, h, w) for activations {tuple(activations.shape)}, "
            f"not {tuple(gradients.shape)}"
        )
    return principal_projection(at_least_float32(gradients) * at_least_float32(activations).unsqueeze(1))


def principal_projection(weighted: Tensor) -> Tensor:
    """The first principal component of weighted activations, in place of their sum over channels.

    The smoothing that the `grad-cam` package calls `eigen_smooth`, with a sign: the map correlates positively with the
    plain sum over channels, which is the method's own map.

    Args:
        weighted: (N, K, C, h, w), activations times whatever a method multiplies them with.
    """
    if weighted.ndim != 5:
        raise ValueError(f"weighted: must be (N, K, C, h, w), not {tuple(weighted.shape)}")
    n, k, _, height, width = weighted.shape
    flat = at_least_float32(weighted).flatten(0, 1)
    return _component(_points(flat), flat.sum(dim=1).flatten(1)).reshape(n, k, height, width)


def kpca_cam(activations: Tensor) -> Tensor:
    """KPCA-CAM: the first kernel principal component of the activations, the same for every class.

    Karmani et al. 2024, https://arxiv.org/abs/2410.00267, with the sigmoid kernel `tanh(x . y / C + 1)` of centred
    activations and the kernel matrix centred, as `KPCA_CAM` of the `grad-cam` package 1.5.7 gets from scikit-learn by
    default. This kernel may have negative eigenvalues: the component is the one of the largest, not of the largest in
    magnitude. Sign: as Eigen-CAM's. Takes memory and time in the square of the number of pixels.
    """
    _check(activations)
    activations = at_least_float32(activations)
    points = _points(activations)
    products = torch.tanh(torch.bmm(points, points.mT) / points.shape[2])
    # tanh(1 + z) less tanh(1), which centring takes away anyway: of small z nothing is lost beside the 1.
    at_zero = math.tanh(_KERNEL_OFFSET)
    kernel = products * (1.0 - at_zero * at_zero) / (1.0 + at_zero * products)
    rows = kernel.mean(dim=2, keepdim=True)
    kernel = kernel - rows - rows.mT + rows.mean(dim=1, keepdim=True)
    # No eigenvalue is further from zero than this: with it on the diagonal the largest one is the largest in magnitude.
    most = (kernel * kernel).sum(dim=(-2, -1), keepdim=True).sqrt()
    pixels = points.shape[1]
    # Not torch.eye, of which torch's ONNX exporter makes slow work.
    places = torch.arange(pixels, device=kernel.device)
    shifted = torch.where(places == places.unsqueeze(1), kernel + most, kernel)
    # The diagonal halves the distance between eigenvalues: once more makes up for it.
    squarings, steps = (_SQUARINGS + 1, _POWER_STEPS) if pixels <= _LARGEST_SQUARED else (0, _LARGE_POWER_STEPS)
    vector = _leading(shifted, squarings)
    for _ in range(steps):
        vector = _unit(torch.bmm(shifted, vector))
    eigenvalue = (vector * torch.bmm(kernel, vector)).sum(dim=1, keepdim=True)
    component = (vector * torch.relu(eigenvalue).sqrt()).squeeze(2)
    component = _signed(component, _energy(activations))
    return component.reshape(-1, 1, *activations.shape[-2:])


def _points(features: Tensor) -> Tensor:
    """Pixels as points, centred: (B, C, h, w) to (B, P, C). All zero where the features only vary by rounding."""
    points = features.flatten(2).mT
    centred = points - points.mean(dim=1, keepdim=True)
    rounding = _FLAT * torch.finfo(points.dtype).eps * points.abs().amax(dim=(-2, -1), keepdim=True)
    flat = centred.abs().amax(dim=(-2, -1), keepdim=True) <= rounding
    return torch.where(flat, 0.0, centred)


def _component(points: Tensor, like: Tensor) -> Tensor:
    """The first principal component of centred points (B, P, C), (B, P), signed to correlate with `like` (B, P)."""
    size = _nonzero(points.abs().amax(dim=(-2, -1), keepdim=True))
    # Squares of tiny gradients would not be floats any more.
    scaled = points / size
    if points.shape[1] <= points.shape[2]:
        projected = _leading(torch.bmm(scaled, scaled.mT), _SQUARINGS)
    else:
        projected = torch.bmm(scaled, _leading(torch.bmm(scaled.mT, scaled), _SQUARINGS))
    for _ in range(_POWER_STEPS):
        projected = torch.bmm(scaled, _unit(torch.bmm(scaled.mT, _unit(projected))))
    return _signed((projected * size).squeeze(2), like)


def _leading(matrix: Tensor, squarings: int) -> Tensor:
    """The first eigenvector (B, S, 1) of positive semidefinite matrices (B, S, S), of any length and sign."""
    for step in range(squarings):
        if step % 2 == 0:
            # Of such a matrix the largest entry is on the diagonal, and no eigenvalue is more than S times it: two
            # squarings make at most S^3 of it, and no less than 1.
            matrix = matrix / _nonzero(matrix.amax(dim=(-2, -1), keepdim=True))
        matrix = torch.bmm(matrix, matrix)
    # Every column is the eigenvector times one of its entries: the longest column has the largest.
    longest = (matrix * matrix).sum(dim=1).argmax(dim=1, keepdim=True)
    chosen = longest == torch.arange(matrix.shape[2], device=matrix.device)
    return torch.where(chosen.unsqueeze(1), matrix, 0.0).sum(dim=2, keepdim=True)


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (B, S, 1) at length 1; zero stays zero."""
    # Scaled first: of small entries the squares would not be floats any more.
    scaled = vectors / _nonzero(vectors.abs().amax(dim=1, keepdim=True))
    return scaled / _nonzero((scaled * scaled).sum(dim=1, keepdim=True).sqrt())


def _signed(component: Tensor, like: Tensor) -> Tensor:
    """A component (B, P) with the sign that makes it correlate with `like` (B, P)."""
    correlation = (component * (like - like.mean(dim=1, keepdim=True))).sum(dim=1, keepdim=True)
    return torch.where(correlation < 0, -component, component)


def _energy(activations: Tensor) -> Tensor:
    """How strongly the network responds at each pixel, (N, P)."""
    return (activations * activations).sum(dim=1).sqrt().flatten(1)


def _nonzero(sizes: Tensor) -> Tensor:
    return torch.where(sizes == 0, 1.0, sizes)


def _check(activations: Tensor) -> None:
    if activations.ndim != 4:
        raise ValueError(f"activations: must be (N, C, h, w), not {tuple(activations.shape)}")
