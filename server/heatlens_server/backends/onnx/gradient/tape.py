"""What rules write a backward pass with: operators, constants, and what is known about the forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Gradients = Sequence[ir.Value | None]

BATCH = -1
"""Stands in shapes for the number of images; -k for k times as many. All other lengths are known numbers."""


class NotDifferentiable(Exception):
    """An operator, or a form of it, has no rule. The message names it."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is known about the values of a forward pass.

    Attributes:
        shapes: by value; a dimension that is the number of images is BATCH, and -k one of k times as many.
        constants: the values that are the same for every image.
        dtype: the element type of the pass's floating point values.
        opset: the version of ONNX's operators.
    """

    shapes: Mapping[ir.Value, Shape]
    constants: Mapping[ir.Value, Array] = field(default_factory=dict)
    dtype: ir.DataType = ir.DataType.FLOAT
    opset: int = 20


class Tape:
    """Writes the nodes of a backward pass, in the order in which they run.

    Attributes:
        nodes: what was written.
        known: what is known about the forward pass.
    """

    def __init__(self, known: Known, wanted: Callable[[ir.Value], bool], *, prefix: str = "gradient") -> None:
        """Write nothing yet.

        Args:
            known: about the forward pass.
            wanted: whether the gradient of a value of the forward pass is needed.
            prefix: of the names of all nodes and values.
        """
        self.known = known
        self.wanted = wanted
        self.nodes: list[ir.Node] = []
        self._prefix = prefix
        self._constants: dict[tuple[str, Shape, bytes], ir.Value] = {}

    @property
    def initializers(self) -> list[ir.Value]:
        """The constants that the nodes read."""
        return list(self._constants.values())

    def op(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:  # noqa: ANN401 - an attribute
        """Write a node of one output; return that."""
        return self.ops(name, inputs, 1, **attributes)[0]

    def ops(
        self,
        name: str,
        inputs: Sequence[ir.Value | None],
        count: int,
        **attributes: Any,  # noqa: ANN401 - what an attribute may be
    ) -> Sequence[ir.Value]:
        """Write a node of several outputs; return them."""
        number = len(self.nodes)
        outputs = [ir.Value(name=f"{self._prefix}_{number}_{name}_{place}") for place in range(count)]
        given = {key: value for key, value in attributes.items() if value is not None}
        node = ir.node(name, inputs, given, outputs=outputs, name=f"{self._prefix}_{number}_{name}")
        self.nodes.append(node)
        return outputs

    def constant(self, values: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> ir.Value:
        """A constant; the same one for the same elements."""
        array = np.asarray(values, dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{self._prefix}_constant_{len(self._constants)}"
            self._constants[key] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        return self._constants[key]

    def number(self, value: float) -> ir.Value:
        """A scalar of the pass's element type."""
        return self.constant(value, self.known.dtype.numpy())

    def ints(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.constant(values, np.int64)

    def shape(self, value: ir.Value) -> Shape:
        """The shape of a value of the forward pass.

        Raises:
            NotDifferentiable: it is not known.
        """
        try:
            return self.known.shapes[value]
        except KeyError:
            raise NotDifferentiable(f"the shape of {value.name!r} is not known") from None

    def rank(self, value: ir.Value) -> int:
        """The number of dimensions of a value of the forward pass."""
        return len(self.shape(value))

    def array(self, value: ir.Value | None) -> Array | None:
        """The elements of a value that is the same for every image; None if it is not, or absent."""
        return None if value is None else self.known.constants.get(value)

    def integers(self, value: ir.Value | None) -> list[int]:
        """The elements of a constant vector of integers.

        Raises:
            NotDifferentiable: it is not constant.
        """
        array = self.array(value)
        if array is None:
            name = "an input" if value is None else repr(value.name)
            raise NotDifferentiable(f"{name} is not constant")
        return [int(item) for item in array.ravel()]

    # What many rules need.

    def cast(self, value: ir.Value) -> ir.Value:
        """A value, such as a comparison's, as the pass's element type."""
        return self.op("Cast", value, to=int(self.known.dtype))

    def scatter_add(
        self, operator: str, data: ir.Value, places: ir.Value | None, updates: ir.Value, **attributes: int
    ) -> ir.Value:
        """Add to elements of float numbers; in float32, as onnxruntime does not do it in float16 on CPUs."""
        if self.known.dtype is not ir.DataType.FLOAT16:
            return self.op(operator, data, places, updates, reduction="add", **attributes)
        wide = [self.op("Cast", value, to=int(ir.DataType.FLOAT)) for value in (data, updates)]
        return self.cast(self.op(operator, wide[0], places, wide[1], reduction="add", **attributes))

    def reshape(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Give a gradient the shape of a value of the forward pass."""
        shape = self.shape(like)
        return self.op("Reshape", value, self.target(shape) or self.op("Shape", like))

    def target(self, shape: Sequence[int]) -> ir.Value | None:
        """What a Reshape takes for a shape; None if several of its dimensions follow the number of images."""
        lengths = [max(length, -1) for length in shape]
        return self.ints(*lengths) if lengths.count(-1) <= 1 else None

    def sum(self, value: ir.Value, axes: Sequence[int], *, keepdims: bool) -> ir.Value:
        """Sum over axes; the value itself if there are none."""
        return self.op("ReduceSum", value, self.ints(*axes), keepdims=int(keepdims)) if axes else value

    def mean(self, value: ir.Value, axes: Sequence[int]) -> ir.Value:
        """The mean over axes, which stay with length 1."""
        return self.op("ReduceMean", value, self.ints(*axes), keepdims=1)

    def expand(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Repeat a gradient, whose dimensions are those of `like` or 1, to the shape of `like`."""
        # Expand broadcasts both ways: a dimension that the gradient has itself may be 1 in the target.
        return self.op("Expand", value, self.ints(*(max(length, 1) for length in self.shape(like))))

    def unbroadcast(self, gradient: ir.Value, source: Shape, like: ir.Value) -> ir.Value:
        """Sum a gradient over what an operator repeated.

        Args:
            gradient: of shape `source`.
            source: the operator's output shape.
            like: the input that was broadcast to it.
        """
        target = self.shape(like)
        extra = len(source) - len(target)
        if extra:
            gradient = self.sum(gradient, range(extra), keepdims=False)
        repeated = [axis for axis, length in enumerate(target) if length == 1 and source[axis + extra] != 1]
        return self.sum(gradient, repeated, keepdims=True)

    def zeros_like(self, value: ir.Value) -> ir.Value:
        """Zeros of the shape of a value of the forward pass."""
        shape = self.shape(value)
        if min(shape, default=1) >= 0:
            return self.constant(np.zeros(shape, self.known.dtype.numpy()))
        zero = ir.tensor(np.zeros(1, self.known.dtype.numpy()))
        return self.op("ConstantOfShape", self.op("Shape", value), value=zero)


def broadcast(*shapes: Shape) -> Shape:
    """The shape that operators broadcast some shapes to."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(next((length for length in lengths if length != 1), 1) for lengths in zip(*padded, strict=True))


Rule = Callable[[ir.Node, Gradients, Tape], Gradients]
"""From a node and the gradients of its outputs (None: nothing depends on it) to those of its inputs (None: zero).

Raises NotDifferentiable. The first gradient is there if the operator has one output.
"""


def only(gradients: Gradients) -> ir.Value:
    """The gradient of the first output, where nothing depends on the others.

    Raises:
        NotDifferentiable: something does.
    """
    first, *others = gradients
    if first is None or any(gradient is not None for gradient in others):
        raise NotDifferentiable("an output besides the first one")
    return first


def input_of(node: ir.Node, place: int = 0) -> ir.Value:
    """An input that must be there.

    Raises:
        NotDifferentiable: it is absent.
    """
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None:
        raise NotDifferentiable(f"{node.op_type} without input {place}")
    return value


def by_first(node: ir.Node, gradient: ir.Value, tape: Tape) -> Gradients:
    """The gradient of the first input alone; weights must not depend on what is explained."""
    if any(value is not None and tape.wanted(value) for value in node.inputs[1:]):
        raise NotDifferentiable(f"{node.op_type} by its weights")
    return [gradient, *[None] * (len(node.inputs) - 1)]
