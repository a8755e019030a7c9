"""Maps of activations and no model: FEM, and the control that every evaluation needs, Random-CAM.

Arguments, results, errors and rules on dtypes and tracing are those of `maps.methods`, where not told otherwise.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from array_api_compat import device

from heatlens_server.maps.arrays import A, mean_places, namespace, places_flat
from heatlens_server.maps.precision import at_least_float32

FEM_DEVIATIONS = 2.0
"""How many standard deviations above its channel's mean an activation is strong: k in the paper."""

_BITS = 24
"""Random weights are multiples of 2^-23: exact in float32."""


def fem(activations: A) -> A:
    """FEM: at every pixel the means of the channels that are strong there, `sum_c mean(A[c]) [A[c] > mean + 2 std]`.

    Fuad et al. 2020, https://hal.science/hal-02963298: the channels' binary maps by the k-sigma rule, weighted by the
    channels' means, with the population's standard deviation; the same for every class. The paper's form, as `xplique`
    computes it. `FEM` of the `grad-cam` package 1.5.7 is another map: it weights the activations themselves, by the
    share of strong pixels. The rule is a step: an activation within rounding of it may fall on either side.
    """
    means, distance = fem_distance(activations)
    xp = namespace(means)
    return xp.sum(xp.where(distance <= 0, 0.0, means), axis=1, keepdims=True)


def fem_distance(activations: A) -> tuple[A, A]:
    """The two things that FEM is made of.

    Args:
        activations: (N, C, h, w).

    Returns:
        The channels' means (N, C, 1, 1), and how far each activation is above its channel's rule (N, C, h, w).

    Raises:
        ValueError: activations is not 4-D.
    """
    _check(activations)
    activations = at_least_float32(activations)
    means = mean_places(activations, keepdims=True)
    centred = activations - means
    deviations = namespace(centred).sqrt(mean_places(centred * centred, keepdims=True))
    return means, centred - FEM_DEVIATIONS * deviations


def random_cam(activations: A, count: int) -> A:
    """Random-CAM: channels weighted by chance, uniformly in [-1, 1). What a method must beat to say anything.

    As `RandomCAM` of the `grad-cam` package, which draws anew for every image and call. Here the weights depend on the
    channel and on the class's position k among the K alone, so that an image has the same maps whenever it is asked
    for: `w[k, c] = frac(a[c] + k b[c])` stretched to [-1, 1), for fixed random a and b, which makes the weights of any
    two positions independent. Integers all the way: every runtime gets the same ones.

    Args:
        activations: (N, C, h, w).
        count: K, how many maps.
    """
    _check(activations)
    activations = at_least_float32(activations)
    xp = namespace(activations)
    images, channels, height, width = activations.shape
    start, step = (xp.asarray(drawn, device=device(activations)) for drawn in _draws(int(channels)))
    positions = xp.expand_dims(xp.arange(count, device=device(activations)), axis=1)
    mixed = xp.astype((start + positions * step) % (1 << _BITS), activations.dtype)
    weights = mixed / float(1 << (_BITS - 1)) - 1.0
    summed: A = xp.matmul(weights, places_flat(activations))
    return xp.reshape(summed, (images, count, height, width))


@lru_cache(maxsize=64)
def _draws(channels: int) -> npt.NDArray[np.int64]:
    """The random a and b of each channel, int64 (2, C), in [0, 2^24); a channel's do not depend on how many there are.

    Drawn with SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195): no library's generator, whose
    streams may change.
    """
    with np.errstate(over="ignore"):
        state = np.arange(1, 2 * channels + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    drawn: npt.NDArray[np.int64] = (state >> np.uint64(64 - _BITS)).astype(np.int64)
    return np.ascontiguousarray(drawn.reshape(channels, 2).T)


def _check(activations: A) -> None:
    if activations.ndim != 4:
        raise ValueError(f"activations: must be (N, C, h, w), not {tuple(activations.shape)}")
