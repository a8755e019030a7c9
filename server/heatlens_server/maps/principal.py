"""Maps that are principal components: how far every pixel's features go in the direction in which they vary most.

A layer's pixels are points in the space of its channels: X (P, C), centred over the P pixels. The map is X v for the
first right singular vector v of X, as in the `grad-cam` package: it centres too, which the first paper does not.

No format that graphs are exported to has a singular value decomposition, so v is found with matrix products: the Gram
matrix of the smaller side, X X^T or X^T X, is squared `_SQUARINGS` = 12 times, and scaled in between. That makes its
(2^12)-th power, in which a second eigenvalue of 0.9975 of the first one is left with 0.00004 of it; its columns all are
the eigenvector. Two power steps with X itself take away what rounding did meanwhile. Eigenvalues that are closer belong
to a component that rounding decides anyway: float32 knows eigenvectors to its epsilon divided by the gap.

A component has no sign of its own. Here it is fixed: see each method. Activations that do not vary give a map of zeros.
Arguments, results, errors and rules on dtypes and tracing are those of `maps.methods`, where not told otherwise.
"""

import math

from array_api_compat import device

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.maps.arrays import (
    A,
    namespace,
    nonzero,
    places_flat,
    product,
    relu,
    silently,
    sum_channels,
    sum_places,
)
from heatlens_server.maps.precision import at_least_float32
from heatlens_server.maps.weights import gradient_times_activation

_SQUARINGS = 12

_POWER_STEPS = 2

_MOST_KERNEL_PLACES = 1600
"""Of a layer that KPCA-CAM explains: a matrix of 10 MB, and a third of a second for its power steps."""

_LARGEST_SQUARED = 512
"""Pixels up to which a kernel matrix is squared: above, its products with itself take longer than any network."""

_LARGE_POWER_STEPS = 256
"""The power steps instead: a second eigenvalue of 0.95 of the first one is left with 0.002 of it."""

_FLAT = 8.0
"""Variation is rounding if its size is no more than so many times the dtype's epsilon of the activations' size."""

_KERNEL_OFFSET = 1.0
"""The sigmoid kernel's coef0, as in scikit-learn."""


def eigen_cam(activations: A) -> A:
    """Eigen-CAM: the first principal component of the activations, the same for every class.

    Muhammad and Yeasin 2020, https://arxiv.org/abs/2008.00299, with activations centred over the pixels as in the
    `grad-cam` package 1.5.7. Sign: correlates positively with the activations' energy, `sqrt(sum_c A[c]^2)`: networks
    respond to objects more than to background.
    """
    _check(activations)
    activations = at_least_float32(activations)
    return _map(_component(_points(activations), _energy(activations)), activations)


def eigen_grad_cam(activations: A, gradients: A) -> A:
    """Eigen-Grad-CAM: the first principal component of gradient times activation.

    As `EigenGradCAM` of the `grad-cam` package 1.5.7; it has no paper. Sign: see `principal_projection`.
    """
    _check(activations)
    if gradients.ndim != 5 or (gradients.shape[0], *gradients.shape[2:]) != activations.shape:
        raise ValueError(
            f"gradients: must be (N, K, C, h, w) for activations {tuple(activations.shape)}, "
            f"not {tuple(gradients.shape)}"
        )
    return principal_projection(gradient_times_activation(activations, gradients))


def principal_projection(weighted: A) -> A:
    """The first principal component of weighted activations, in place of their sum over channels.

    The smoothing that the `grad-cam` package calls `eigen_smooth`, with a sign: the map correlates positively with the
    plain sum over channels, which is the method's own map.

    Args:
        weighted: (N, K, C, h, w), activations times whatever a method multiplies them with.
    """
    if weighted.ndim != 5:
        raise ValueError(f"weighted: must be (N, K, C, h, w), not {tuple(weighted.shape)}")
    xp = namespace(weighted)
    images, classes, *each = weighted.shape
    rows = xp.reshape(at_least_float32(weighted), (-1, *each))
    with silently():
        component = _component(_points(rows), places_flat(sum_channels(rows)))
    return xp.reshape(component, (images, classes, *each[1:]))


def check_places(method: Method, place: int, layer: str, features: A) -> None:
    """Refuse what would take minutes and gigabytes: KPCA-CAM by an early layer of a large image.

    Args:
        method: any.
        place: the layer's among those that are explained.
        layer: its name.
        features: (N, C, h, w), concrete.

    Raises:
        InvalidArgument: it is KPCA-CAM, and the layer has more than 1,600 places.
    """
    height, width = features.shape[2:]
    if method is Method.KPCA_CAM and height * width > _MOST_KERNEL_PLACES:
        raise InvalidArgument.of(
            f"layers[{place}]",
            f"{method} compares every place of a layer with every other: it takes layers of at most "
            f"{_MOST_KERNEL_PLACES} places, and {layer!r} has {height}x{width}",
            reason="INVALID_OPTION",
        )


def kpca_cam(activations: A) -> A:
    """KPCA-CAM: the first kernel principal component of the activations, the same for every class.

    Karmani et al. 2024, https://arxiv.org/abs/2410.00267, with the sigmoid kernel `tanh(x . y / C + 1)` of centred
    activations and the kernel matrix centred, as `KPCA_CAM` of the `grad-cam` package 1.5.7 gets from scikit-learn by
    default. This kernel may have negative eigenvalues: the component is the one of the largest, not of the largest in
    magnitude. Sign: as Eigen-CAM's. Takes memory and time in the square of the number of pixels.
    """
    _check(activations)
    activations = at_least_float32(activations)
    points = _points(activations)
    xp = namespace(points)
    products = xp.tanh(product(points, xp.matrix_transpose(points)) / points.shape[2])
    # tanh(1 + z) less tanh(1), which centring takes away anyway: of small z nothing is lost beside the 1.
    at_zero = math.tanh(_KERNEL_OFFSET)
    kernel = products * (1.0 - at_zero * at_zero) / (1.0 + at_zero * products)
    rows = xp.mean(kernel, axis=2, keepdims=True)
    kernel = kernel - rows - xp.matrix_transpose(rows) + xp.mean(rows, axis=1, keepdims=True)
    # No eigenvalue is further from zero than this: with it on the diagonal the largest one is the largest in magnitude.
    most = xp.sqrt(sum_places(kernel * kernel, keepdims=True))
    pixels = points.shape[1]
    # Not the library's identity, of which torch's ONNX exporter makes slow work.
    places = xp.arange(pixels, device=device(kernel))
    shifted = xp.where(xp.equal(places, xp.expand_dims(places, axis=1)), kernel + most, kernel)
    # The diagonal halves the distance between eigenvalues: once more makes up for it.
    squarings, steps = (_SQUARINGS + 1, _POWER_STEPS) if pixels <= _LARGEST_SQUARED else (0, _LARGE_POWER_STEPS)
    vector = _leading(shifted, squarings)
    for _ in range(steps):
        vector = _unit(product(shifted, vector))
    eigenvalue = xp.sum(vector * product(kernel, vector), axis=1, keepdims=True)
    component = xp.squeeze(vector * xp.sqrt(relu(eigenvalue)), axis=2)
    return _map(_signed(component, _energy(activations)), activations)


def _points(features: A) -> A:
    """Pixels as points, centred: (B, C, h, w) to (B, P, C). All zero where the features only vary by rounding."""
    xp = namespace(features)
    points = xp.matrix_transpose(places_flat(features))
    centred = points - xp.mean(points, axis=1, keepdims=True)
    rounding = _FLAT * float(xp.finfo(points.dtype).eps) * _largest(points)
    return xp.where(_largest(centred) <= rounding, 0.0, centred)


def _component(points: A, like: A) -> A:
    """The first principal component of centred points (B, P, C), (B, P), signed to correlate with `like` (B, P)."""
    xp = namespace(points)
    size = nonzero(_largest(points))
    # Squares of tiny gradients would not be floats any more.
    scaled = points / size
    turned = xp.matrix_transpose(scaled)
    if points.shape[1] <= points.shape[2]:
        projected = _leading(product(scaled, turned), _SQUARINGS)
    else:
        projected = product(scaled, _leading(product(turned, scaled), _SQUARINGS))
    for _ in range(_POWER_STEPS):
        projected = product(scaled, _unit(product(turned, _unit(projected))))
    return _signed(xp.squeeze(projected * size, axis=2), like)


def _leading(matrix: A, squarings: int) -> A:
    """The first eigenvector (B, S, 1) of positive semidefinite matrices (B, S, S), of any length and sign."""
    xp = namespace(matrix)
    for step in range(squarings):
        if step % 2 == 0:
            # Of such a matrix the largest entry is on the diagonal, and no eigenvalue is more than S times it: two
            # squarings make at most S^3 of it, and no less than 1.
            matrix = matrix / nonzero(xp.max(matrix, axis=(-2, -1), keepdims=True))
        matrix = product(matrix, matrix)
    # Every column is the eigenvector times one of its entries: the longest column has the largest.
    longest = xp.argmax(xp.sum(matrix * matrix, axis=1), axis=1, keepdims=True)
    chosen = xp.equal(longest, xp.arange(matrix.shape[2], device=device(matrix)))
    return xp.sum(xp.where(xp.expand_dims(chosen, axis=1), matrix, 0.0), axis=2, keepdims=True)


def _unit(vectors: A) -> A:
    """Vectors (B, S, 1) at length 1; zero stays zero."""
    # Scaled first: of small entries the squares would not be floats any more.
    xp = namespace(vectors)
    scaled = vectors / nonzero(_largest(vectors))
    return scaled / nonzero(xp.sqrt(xp.sum(scaled * scaled, axis=1, keepdims=True)))


def _signed(component: A, like: A) -> A:
    """A component (B, P) with the sign that makes it correlate with `like` (B, P)."""
    xp = namespace(component)
    correlation = xp.sum(component * (like - xp.mean(like, axis=1, keepdims=True)), axis=1, keepdims=True)
    return xp.where(correlation < 0, -component, component)


def _energy(activations: A) -> A:
    """How strongly the network responds at each pixel, (N, P)."""
    return places_flat(namespace(activations).sqrt(sum_channels(activations * activations)))


def _largest(matrices: A) -> A:
    """The largest magnitude in each of (B, R, S), as (B, 1, 1)."""
    xp = namespace(matrices)
    return xp.max(xp.abs(matrices), axis=(-2, -1), keepdims=True)


def _map(component: A, activations: A) -> A:
    """A component (N, P) as the map (N, 1, h, w) of activations."""
    return namespace(component).reshape(component, (-1, 1, *activations.shape[2:]))


def _check(activations: A) -> None:
    if activations.ndim != 4:
        raise ValueError(f"activations: must be (N, C, h, w), not {tuple(activations.shape)}")
