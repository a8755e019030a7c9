"""Operators that are added to a file's graph, to bring what it returns into the form that is explained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.tape import Array, Known, Shape
from heatlens_server.core.errors import ModelLoadError


class NotReturned(ModelLoadError):
    """A file returns nothing of the form that was looked for, or several that are."""


class Added:
    """Adds operators at the end of a graph, and knows their shapes.

    Attributes:
        known: what was known before.
    """

    def __init__(self, model: ir.Model, known: Known) -> None:
        """Add nothing yet.

        Args:
            model: from `read_file`.
            known: its shapes.
        """
        self._model = model
        self.known = known
        self._shapes: dict[ir.Value, Shape] = {}
        self._constants: dict[ir.Value, Array] = {}

    def shape(self, value: ir.Value) -> Shape:
        """The shape of a value; () if it is not known."""
        return self._shapes.get(value, self.known.shapes.get(value, ()))

    def op(
        self, operator: str, inputs: Sequence[ir.Value | None], shape: Shape, **attributes: str | int | list[int]
    ) -> ir.Value:
        """Add an operator of one output of a shape; return that."""
        return self._add(operator, inputs, [shape], attributes)[0]

    def like(self, value: ir.Value, inputs: Sequence[ir.Value | None]) -> ir.Value:
        """Add the operator that makes a value, with other inputs of the same shapes; return what it makes of them."""
        node = value.producer()
        if node is None:
            raise ValueError("no operator makes the value")
        shapes = [self.shape(output) for output in node.outputs]
        return self._add(node.op_type, inputs, shapes, node.attributes)[node.outputs.index(value)]

    def ints(self, *values: int) -> ir.Value:
        """Add a constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def constant(self, array: Array) -> ir.Value:
        """Add a constant."""
        name = f"heatlens_constant_{len(self._constants)}"
        constant = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        self._model.graph.register_initializer(constant)
        self._constants[constant], self._shapes[constant] = array, array.shape
        return constant

    def floats(self, *values: float) -> ir.Value:
        """Add a constant vector of the graph's floating point type."""
        return self.constant(np.array(values, self.known.dtype.numpy()))

    def finish(self) -> Known:
        """What is known, with what was added."""
        common.AddDefaultAttributesPass()(self._model)
        shapes, constants = {**self.known.shapes, **self._shapes}, {**self.known.constants, **self._constants}
        return replace(self.known, shapes=shapes, constants=constants)

    def _add(
        self, operator: str, inputs: Sequence[ir.Value | None], shapes: Sequence[Shape], attributes: Mapping[str, Any]
    ) -> Sequence[ir.Value]:
        name = f"heatlens_{len(self._shapes)}_{operator}"
        kind = ir.TensorType(ir.DataType.BOOL if operator == "Equal" else self.known.dtype)
        outputs = [ir.Value(name=f"{name}_{place}", type=kind) for place in range(len(shapes))]
        self._model.graph.append(ir.node(operator, inputs, attributes, outputs=outputs, name=name))
        self._shapes |= dict(zip(outputs, shapes, strict=True))
        return outputs
