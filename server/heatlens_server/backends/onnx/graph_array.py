# ruff: noqa: D102 - the standard says what each function does
"""Arrays that are yet to be computed: what the functions of `maps/` do with them becomes operators of an ONNX graph.

They are arrays of the Python array API as far as `maps.arrays` needs it. The device of such an array is the tape that
its operators are written to.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Tape, broadcast
from heatlens_server.core.methods import Method
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.normalization import normalize

_BOOL = ir.DataType.BOOL
_INT64 = ir.DataType.INT64


@dataclass(frozen=True, slots=True)
class Length:
    """A length that is known when the graph runs: that of an axis of a value."""

    value: ir.Value
    axis: int


Lengths = tuple[Any, ...]
"""A shape: numbers, and a `Length` for what is none."""


def write_map(
    tape: Tape,
    method: Method,
    activations: ir.Value,
    factors: ir.Value,
    *,
    shape: tuple[int, int, int],
    classes: int | None = None,
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Write a closed form: `maps.methods.raw_map` and `maps.normalization.normalize`.

    Args:
        tape: of opset 18 or later; what it knows about values is not asked for.
        method: one of `core.methods.CLOSED_FORMS`.
        activations: (N, C, h, w) of the tape's element type.
        factors: of the same type, the gradients (N, K, C, h, w), or the class weights (N, K, C) for `Method.CAM`; for
            methods that know no class, anything of (N, K, ...), whose elements are not read.
        shape: (C, h, w).
        classes: K; None if it is known when the graph runs.

    Returns:
        cam (N, K, h, w), cam_scale (N, K), cam_offset (N, K), of the activations' type and at least float32; their
        types and shapes are filled in.
    """
    images = Length(activations, 0)
    per_class: Lengths = (images, Length(factors, 1) if classes is None else classes)
    if not method.traits.class_free:
        per_class += shape[:1] if method is Method.CAM else shape
    dtype = tape.known.dtype
    maps = normalize(
        raw_map(
            method,
            GraphArray(activations, (images, *shape), dtype, tape),
            GraphArray(factors, per_class, dtype, tape),
        )
    )
    for array in (maps.values, maps.scale, maps.offset):
        array.value.type = ir.TensorType(array.dtype)
        array.value.shape = ir.Shape(length if isinstance(length, int) else None for length in array.shape)
    return maps.values.value, maps.scale.value, maps.offset.value


@dataclass(frozen=True, slots=True, eq=False)
class GraphArray:
    """An array of a graph.

    Attributes:
        value: what holds it when the graph runs.
        shape: the length of each axis.
        dtype: the element type.
        device: the tape that operators are written to.
    """

    value: ir.Value
    shape: Lengths
    dtype: ir.DataType
    device: Tape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __array_namespace__(self, *, api_version: str | None = None) -> "Functions":
        """What the array API looks for."""
        return _FUNCTIONS

    def __add__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Add", self, other)

    def __radd__(self, other: float, /) -> "GraphArray":
        return _elementwise("Add", other, self)

    def __sub__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Sub", self, other)

    def __mul__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Mul", self, other)

    def __rmul__(self, other: float, /) -> "GraphArray":
        return _elementwise("Mul", other, self)

    def __truediv__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Div", self, other)

    def __mod__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Mod", self, other)

    def __neg__(self) -> "GraphArray":
        return _elementwise("Neg", self)

    def __lt__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("Less", self, other, dtype=_BOOL)

    def __le__(self, other: "Operand", /) -> "GraphArray":
        return _elementwise("LessOrEqual", self, other, dtype=_BOOL)


Operand = GraphArray | float
Axis = int | tuple[int, ...]


class Functions:
    """The functions of `maps.arrays.Namespace`, and relu, an operator of ONNX as it is of torch."""

    __name__ = "ONNX"
    float32 = ir.DataType.FLOAT
    int64 = _INT64
    inf = math.inf

    def abs(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Abs", x)

    def arange(self, stop: int | Length, /, *, device: Tape) -> GraphArray:
        if isinstance(stop, int):
            return self.asarray(np.arange(stop), device=device)
        end = device.op("Squeeze", _sizes(device, [stop]))
        numbers = device.op("Range", device.constant(0, np.int64), end, device.constant(1, np.int64))
        return GraphArray(numbers, (stop,), _INT64, device)

    def argmax(self, x: GraphArray, /, *, axis: int, keepdims: bool) -> GraphArray:
        shape = _without(x.shape, axis, keepdims=keepdims)
        return _written("ArgMax", x, shape=shape, dtype=_INT64, axis=axis, keepdims=int(keepdims))

    def argsort(self, x: GraphArray, /, *, axis: int, descending: bool, stable: bool) -> GraphArray:
        # Of equals, TopK takes the lower place first by contract.
        if not (descending and stable):
            raise ValueError("sorted is from the largest down, equals in order")
        count = x.device.ints(x.shape[axis])
        _values, places = x.device.ops("TopK", [x.value, count], 2, axis=axis, largest=1, sorted=1)
        return GraphArray(places, x.shape, _INT64, x.device)

    def asarray(self, values: npt.ArrayLike, /, *, device: Tape) -> GraphArray:
        array = np.asarray(values)
        return GraphArray(device.constant(array), array.shape, ir.DataType.from_numpy(array.dtype), device)

    def astype(self, x: GraphArray, dtype: ir.DataType, /) -> GraphArray:
        return _written("Cast", x, shape=x.shape, dtype=dtype, to=int(dtype))

    def broadcast_to(self, x: GraphArray, /, shape: Lengths) -> GraphArray:
        # Expand leaves an axis as it is where 1 is asked for.
        own_shape = (1,) * (len(shape) - x.ndim) + x.shape
        wanted = [1 if own == length else length for own, length in zip(own_shape, shape, strict=True)]
        return _written("Expand", x, _sizes(x.device, wanted), shape=tuple(shape))

    def equal(self, x: GraphArray, y: Operand, /) -> GraphArray:
        return _elementwise("Equal", x, y, dtype=_BOOL)

    def exp(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Exp", x)

    def expand_dims(self, x: GraphArray, /, *, axis: Axis) -> GraphArray:
        added = _axes(axis, x.ndim + (len(axis) if isinstance(axis, tuple) else 1))
        own = iter(x.shape)
        shape = tuple(1 if place in added else next(own) for place in range(x.ndim + len(added)))
        return _written("Unsqueeze", x, x.device.ints(*added), shape=shape)

    def finfo(self, dtype: ir.DataType, /) -> np.finfo[Any]:
        return np.finfo(dtype.numpy())

    def log(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Log", x)

    def logical_or(self, x: GraphArray, y: GraphArray, /) -> GraphArray:
        return _elementwise("Or", x, y)

    def matmul(self, x: GraphArray, y: GraphArray, /) -> GraphArray:
        shape = (*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1])
        return _written("MatMul", x, y.value, shape=shape)

    def matrix_transpose(self, x: GraphArray, /) -> GraphArray:
        order = [*range(x.ndim - 2), x.ndim - 1, x.ndim - 2]
        return _written("Transpose", x, shape=tuple(x.shape[place] for place in order), perm=order)

    def max(self, x: GraphArray, /, *, axis: Axis, keepdims: bool) -> GraphArray:
        return _reduced("ReduceMax", x, axis, keepdims=keepdims)

    def mean(
        self, x: GraphArray, /, *, axis: Axis, keepdims: bool = False, dtype: ir.DataType | None = None
    ) -> GraphArray:
        wide = x if dtype in {None, x.dtype} else self.astype(x, dtype)
        return _reduced("ReduceMean", wide, axis, keepdims=keepdims)

    def min(self, x: GraphArray, /, *, axis: Axis, keepdims: bool) -> GraphArray:
        return _reduced("ReduceMin", x, axis, keepdims=keepdims)

    def relu(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Relu", x)

    def reshape(self, x: GraphArray, /, shape: Lengths) -> GraphArray:
        shape = _filled(x.shape, tuple(shape))
        sizes: list[Any] = []
        for place, length in enumerate(shape):
            if isinstance(length, int):
                sizes.append(length)
            elif x.shape[place : place + 1] == (length,):
                # ONNX's word for a length that stays.
                sizes.append(0)
            else:
                sizes.append(length if -1 in shape or -1 in sizes else -1)
        value = x.device.op("Reshape", x.value, _sizes(x.device, sizes))
        lengths = tuple(Length(value, place) if length == -1 else length for place, length in enumerate(shape))
        return GraphArray(value, lengths, x.dtype, x.device)

    def sqrt(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Sqrt", x)

    def squeeze(self, x: GraphArray, /, *, axis: Axis) -> GraphArray:
        axes = x.device.ints(*_axes(axis, x.ndim))
        return _written("Squeeze", x, axes, shape=_without(x.shape, axis, keepdims=False))

    def sum(self, x: GraphArray, /, *, axis: Axis, keepdims: bool = False) -> GraphArray:
        return _reduced("ReduceSum", x, axis, keepdims=keepdims)

    def take_along_axis(self, x: GraphArray, places: GraphArray, /, *, axis: int) -> GraphArray:
        return _written("GatherElements", x, places.value, shape=places.shape, axis=axis)

    def tanh(self, x: GraphArray, /) -> GraphArray:
        return _elementwise("Tanh", x)

    def where(self, condition: GraphArray, x: Operand, y: Operand, /) -> GraphArray:
        return _elementwise("Where", condition, x, y)


_FUNCTIONS = Functions()


def _written(
    operator: str,
    x: GraphArray,
    *others: ir.Value,
    shape: Lengths,
    dtype: ir.DataType | None = None,
    **attributes: Any,  # noqa: ANN401 - what an attribute may be
) -> GraphArray:
    """Write an operator whose result is of the first operand's type, or of another."""
    return GraphArray(x.device.op(operator, x.value, *others, **attributes), shape, dtype or x.dtype, x.device)


def _elementwise(operator: str, *operands: Operand, dtype: ir.DataType | None = None) -> GraphArray:
    """Write an operator that broadcasts; numbers are of the type of the last array, which the result is of, too."""
    like = next(operand for operand in reversed(operands) if isinstance(operand, GraphArray))
    arrays = [
        operand
        if isinstance(operand, GraphArray)
        else GraphArray(like.device.constant(operand, like.dtype.numpy()), (), like.dtype, like.device)
        for operand in operands
    ]
    value = like.device.op(operator, *(array.value for array in arrays))
    return GraphArray(value, broadcast(*(array.shape for array in arrays)), dtype or like.dtype, like.device)


def _reduced(operator: str, x: GraphArray, axis: Axis, *, keepdims: bool) -> GraphArray:
    axes = x.device.ints(*_axes(axis, x.ndim))
    shape = _without(x.shape, axis, keepdims=keepdims)
    return _written(operator, x, axes, shape=shape, keepdims=int(keepdims))


def _axes(axis: Axis, rank: int) -> list[int]:
    """Axes counted from the front, in order."""
    return sorted(one % rank for one in (axis if isinstance(axis, tuple) else (axis,)))


def _without(shape: Lengths, axis: Axis, *, keepdims: bool) -> Lengths:
    """A shape without some axes, or with 1 in their places."""
    gone = _axes(axis, len(shape))
    kept = (1 if place in gone else length for place, length in enumerate(shape))
    return tuple(length for place, length in enumerate(kept) if keepdims or place not in gone)


def _filled(source: Lengths, shape: Lengths) -> Lengths:
    """A shape with what -1 in it stands for, if that is one length of the source, or a number."""
    merged = [length for length in source if isinstance(length, Length) and length not in shape]
    factor = math.prod(_numbers(source)) // abs(math.prod(_numbers(shape)))
    if len(merged) > 1 or (merged and factor != 1):
        return shape
    return tuple((merged[0] if merged else factor) if length == -1 else length for length in shape)


def _numbers(lengths: Sequence[Any]) -> list[int]:
    return [length for length in lengths if isinstance(length, int)]


def _sizes(tape: Tape, lengths: Sequence[Any]) -> ir.Value:
    """Lengths as a vector of int64."""
    if len(_numbers(lengths)) == len(lengths):
        return tape.ints(*lengths)
    parts = [
        tape.op("Shape", length.value, start=length.axis, end=length.axis + 1)
        if isinstance(length, Length)
        else tape.ints(length)
        for length in lengths
    ]
    return parts[0] if len(parts) == 1 else tape.op("Concat", *parts, axis=0)
