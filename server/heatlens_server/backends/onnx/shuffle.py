"""Weights that mean nothing, for the check of Adebayo et al. 2018, https://arxiv.org/abs/1810.03292."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SEED = 0


def shuffled(weights: Mapping[str, Array]) -> dict[str, Array]:
    """Put the elements of every weight in another order, always the same.

    Args:
        weights: by name; those of integers of more than a byte are none, and stay.
    """
    generator = np.random.Generator(np.random.PCG64(_SEED))
    return {
        name: generator.permutation(array.ravel()).reshape(array.shape)
        if array.dtype.kind == "f" or array.dtype.itemsize == 1
        else array
        for name, array in weights.items()
    }
