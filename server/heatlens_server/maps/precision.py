"""The precision that map maths runs in: never less than float32."""

from functools import lru_cache
from typing import Any

from heatlens_server.maps.arrays import A, Namespace, namespace


@lru_cache(maxsize=64)
def accumulator(xp: Namespace, dtype: Any) -> Any:  # noqa: ANN401 - of the library
    """The floating point dtype to sum in: float32 for those of 16 bits, the dtype itself otherwise."""
    return xp.float32 if xp.finfo(dtype).bits < 32 else dtype


def at_least_float32(x: A) -> A:
    """The array in the dtype to sum in; itself, uncopied, if it has that already."""
    xp = namespace(x)
    dtype = accumulator(xp, x.dtype)
    return x if x.dtype == dtype else xp.astype(x, dtype)


FP16_GRADIENT_SCALE = 2.0**8
"""What a float16 score is multiplied by before it is differentiated, and its gradients divided by, in float32: exact.

Gradients of a logit with respect to a deep layer are often below float16's smallest normal number (6e-5).
"""
