"""Noise that is the same for every image, on every device and in every engine."""

from collections.abc import Iterable

import numpy as np
from array_api_compat import array_namespace, device

from heatlens_server.maps.concrete import Array

_SEED = 0


def generator(number: int) -> np.random.Generator:
    """The generator of one field of noise, by its number >= 0."""
    return np.random.Generator(np.random.PCG64((_SEED, number)))


def standard_normal(numbers: Iterable[int], shape: tuple[int, ...], like: Array) -> Array:
    """Fields of normal noise of mean 0 and deviation 1, by their numbers.

    Each is drawn by a generator of its own (PCG64, O'Neill 2014, https://www.pcg-random.org/paper.html), so that those
    between two numbers need not be drawn, and on the host, since devices draw otherwise.

    Args:
        numbers: M of them, each >= 0.
        shape: of a field.
        like: an array of the library and on the device where they are wanted.

    Returns:
        float32 (M, *shape).
    """
    fields = [generator(number).standard_normal(shape, np.float32) for number in numbers]
    return array_namespace(like).asarray(np.stack(fields), device=device(like))
