# ruff: noqa: ANN401, D102 - the standard says what each function does, and libraries have types of their own
"""The arrays that maps are computed with: torch's, numpy's, or any that follows the Python array API standard.

https://data-apis.org/array-api/latest/. `Array` and `Namespace` are the part of the standard that the methods use, and
so what another kind of array has to have. Some functions have a form of their own for a library that is slow at the
common one; which library it is shows by the array.
"""

from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
from array_api_compat import array_namespace

Axis = int | tuple[int, ...]


class Array(Protocol):
    """An array. Operators broadcast, and take Python's numbers as numbers of the array's own dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The length of each axis: a number, or what stands for one while a graph is written."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    @property
    def dtype(self) -> Any:
        """The type of the elements."""

    def __add__(self, other: Any, /) -> Self: ...
    def __radd__(self, other: Any, /) -> Self: ...
    def __sub__(self, other: Any, /) -> Self: ...
    def __mul__(self, other: Any, /) -> Self: ...
    def __rmul__(self, other: Any, /) -> Self: ...
    def __truediv__(self, other: Any, /) -> Self: ...
    def __mod__(self, other: Any, /) -> Self: ...
    def __neg__(self) -> Self: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __le__(self, other: Any, /) -> Any: ...


A = TypeVar("A", bound=Array)
"""Arrays of one library."""


class Namespace(Protocol):
    """The functions of a library of arrays, of the names and the meanings of the standard."""

    float32: Any

    def __hash__(self) -> int: ...

    def abs(self, x: A, /) -> A: ...
    def arange(self, stop: int, /, *, device: Any) -> Any: ...
    def argmax(self, x: A, /, *, axis: int, keepdims: bool) -> A: ...
    def asarray(self, values: object, /, *, device: Any) -> Any: ...
    def astype(self, x: A, dtype: Any, /) -> A: ...
    def broadcast_to(self, x: A, /, shape: tuple[int, ...]) -> A: ...
    def equal(self, x: A, y: A | float, /) -> Any: ...
    def expand_dims(self, x: A, /, *, axis: Axis) -> A: ...
    def finfo(self, dtype: Any, /) -> Any: ...
    def matmul(self, x: A, y: A, /) -> A: ...
    def matrix_transpose(self, x: A, /) -> A: ...
    def max(self, x: A, /, *, axis: Axis, keepdims: bool) -> A: ...
    def mean(self, x: A, /, *, axis: Axis, keepdims: bool = False, dtype: Any = None) -> A:
        """The standard lacks dtype, which the libraries have."""

    def min(self, x: A, /, *, axis: Axis, keepdims: bool) -> A: ...
    def reshape(self, x: A, /, shape: tuple[int, ...]) -> A: ...
    def sqrt(self, x: A, /) -> A: ...
    def squeeze(self, x: A, /, *, axis: Axis) -> A: ...
    def sum(self, x: A, /, *, axis: Axis, keepdims: bool = False) -> A: ...
    def tanh(self, x: A, /) -> A: ...
    def where(self, condition: object, x: A | float, y: A | float, /) -> A: ...


_NAMESPACES: dict[type, Namespace] = {}


def namespace(x: Array) -> Namespace:
    """The functions of an array's library."""
    # Found once for each class of arrays: finding it takes as long as an operator on a small array.
    known = _NAMESPACES.get(type(x))
    if known is None:
        known = _NAMESPACES[type(x)] = cast("Namespace", array_namespace(x))
    return known


def silently() -> np.errstate:
    """A context in which numpy passes on what is not finite without a warning, as other libraries do."""
    return np.errstate(divide="ignore", over="ignore", invalid="ignore")


def relu(x: A) -> A:
    """The larger of each element and 0. A NaN stays; -inf is 0."""
    # Where a library has an operator for it, so have the formats that its graphs are written in.
    own: Any = getattr(namespace(x), "relu", None) or _numpy_relu
    result: A = own(x)
    return result


def nonzero(x: A) -> A:
    """A denominator: 1 where it is exactly 0."""
    xp = namespace(x)
    return xp.where(xp.equal(x, 0), 1.0, x)


def product(x: A, y: A) -> A:
    """Matrix products, (B, R, S) @ (B, S, T) to (B, R, T)."""
    xp = namespace(x)
    # Torch's matmul of batches is traced as bmm between expansions and reshapes that change nothing.
    own = getattr(xp, "bmm", xp.matmul)
    result: A = own(x, y)
    return result


def places_flat(x: A) -> A:
    """Put the places of maps on one axis, (..., h, w) to (..., h * w)."""
    *leading, height, width = x.shape
    return namespace(x).reshape(x, (*leading, height * width))


def sum_places(x: A, *, keepdims: bool = False) -> A:
    """Sum maps over their places, (..., h, w) to (...), or to (..., 1, 1)."""
    xp = namespace(x)
    if not _in_numpy(x):
        return xp.sum(x, axis=(-2, -1), keepdims=keepdims)
    # numpy sums such short rows one after the other; a product with ones takes a fifth of the time.
    flat: Any = places_flat(x)
    summed: A = flat @ np.ones(flat.shape[-1], flat.dtype)
    return xp.expand_dims(summed, axis=(-2, -1)) if keepdims else summed


def mean_places(x: A, *, dtype: Any = None, keepdims: bool = False) -> A:
    """The mean of maps over their places, (..., h, w) to (...) or (..., 1, 1), summed in a dtype or in their own."""
    xp = namespace(x)
    if not _in_numpy(x):
        return xp.mean(x, axis=(-2, -1), keepdims=keepdims, dtype=dtype)
    wide = x if dtype in {None, x.dtype} else xp.astype(x, dtype)
    return sum_places(wide, keepdims=keepdims) / (x.shape[-2] * x.shape[-1])


def sum_channels(x: A) -> A:
    """Sum (..., C, h, w) over the channels to (..., h, w)."""
    xp = namespace(x)
    if not _in_numpy(x):
        return xp.sum(x, axis=-3)
    # As above.
    *leading, channels, height, width = x.shape
    flat: Any = places_flat(x)
    summed: A = np.ones(channels, flat.dtype) @ flat
    return xp.reshape(summed, (*leading, height, width))


def _in_numpy(x: Array) -> bool:
    return isinstance(x, np.ndarray)


def _numpy_relu(x: Any) -> Any:
    return np.maximum(x, 0.0)
