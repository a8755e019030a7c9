"""Min-max of maps, with what it takes to undo it."""

from dataclasses import dataclass
from typing import Generic

from heatlens_server.maps.arrays import A, namespace, nonzero, relu, silently
from heatlens_server.maps.precision import at_least_float32


@dataclass(frozen=True, slots=True, eq=False)
class NormalizedMap(Generic[A]):
    """Maps stretched to [0, 1] and the numbers that were divided out: values * scale + offset is relu(raw).

    Attributes:
        values: (..., h, w), in [0, 1]: exactly 0 at the minimum and 1 at the maximum; all zeros if the map is flat.
        scale: (...), the maximum minus the minimum of relu(raw); 0 if the map is flat.
        offset: (...), the minimum of relu(raw).
    """

    values: A
    scale: A
    offset: A


def normalize(raw: A) -> NormalizedMap[A]:
    """ReLU, then min-max over the last two dimensions. Each map on its own, no epsilon.

    Libraries add an epsilon (1e-7, 1e-8) to the denominator, which turns maps of tiny gradients into nothing and is
    zero in float16. Here a flat map is found by its scale of exactly zero, and every other range is divided out in
    full, denormals included. Non-finite input is not hidden: a map with a NaN or +inf has NaN in its values and a
    non-finite scale, and the other maps of the batch are not touched. -inf is a negative value: the ReLU makes it 0.

    Args:
        raw: (..., h, w) floating point, not empty.

    Returns:
        The maps, in float32 if raw is float16 or bfloat16 and in raw's dtype otherwise. Half precision comes back as
        float32 because the identity above would not survive rounding to it.
    """
    xp = namespace(raw)
    with silently():
        positive = relu(at_least_float32(raw))
        offset = xp.min(positive, axis=(-2, -1), keepdims=True)
        scale = xp.max(positive, axis=(-2, -1), keepdims=True) - offset
        # A true division: 1 / scale is infinite for denormal scales.
        values = (positive - offset) / nonzero(scale)
    scale, offset = (xp.squeeze(kept, axis=(-2, -1)) for kept in (scale, offset))
    return NormalizedMap(values=values, scale=scale, offset=offset)
