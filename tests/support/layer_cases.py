"""Activations and gradients of layers, as networks have them and as they seldom are, in numpy's float64."""

import itertools

import numpy as np

from heatlens_server.core.methods import Method

SHAPES = ((1, 1, 1, 1, 1), (2, 3, 16, 7, 7), (3, 1, 5, 4, 6), (1, 4, 64, 1, 1), (2, 2, 3, 1, 9), (1, 2, 40, 14, 14))
"""(N, K, C, h, w): with one place, with more places than channels, and with fewer."""

KINDS = ("typical", "signed", "constant", "zero", "no gradient")

CASES = tuple(itertools.product(SHAPES, KINDS))


def layer_case(shape, kind="typical", seed=0):
    """Activations (N, C, h, w) and gradients (N, K, C, h, w).

    A bright spot in many channels over weaker noise, and gradients that vary little from place to place: components
    that are far apart. Otherwise rounding alone would tell two of them apart.
    """
    images, classes, channels, height, width = shape
    rng = np.random.default_rng(seed)
    place = np.arange(height * width).reshape(height, width)
    spot = np.exp(-(((place - rng.uniform(0, height * width, (images, 1, 1, 1))) / 4) ** 2))
    noise = rng.standard_normal((images, channels, height, width))
    activations = 2 * spot * rng.uniform(0.5, 1, (images, channels, 1, 1)) + 0.2 * noise
    signs = rng.choice([-1, 1], (classes, channels, 1, 1))
    # At least one channel speaks for each class.
    signs[:, 0] = 1
    gradients = rng.uniform(0.5, 1, (images, classes, channels, 1, 1)) * signs
    gradients = 1e-2 * (gradients + 0.1 * rng.standard_normal((images, classes, channels, height, width)))
    if kind == "typical":
        activations = np.maximum(activations, 0)
    elif kind == "constant":
        activations = np.broadcast_to(activations.mean(axis=(2, 3), keepdims=True), activations.shape).copy()
    elif kind == "zero":
        activations = activations * 0
    elif kind == "no gradient":
        gradients = gradients * 0
    return activations, gradients


def factors_of(method, gradients):
    """What a method weights activations by: gradients, or their sums in the place of a head's weights."""
    return gradients.sum(axis=(-2, -1)) if method is Method.CAM else gradients
