"""Types, shapes and small constants of a graph for an input of one shape, from the graph alone: nothing is run.

Node by node, onnx infers the types of outputs from those of inputs, and from the elements of those that say shapes.
What small arrays and shapes follow from is computed, so that a Reshape to a computed shape is understood.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.arithmetic import GROWING, can_compute, compute
from heatlens_server.backends.onnx.gradient.tape import Array, Shape
from heatlens_server.core.errors import ModelLoadError

MOST_CONSTANT_ELEMENTS = 1 << 16
_MOST_COMPUTED_ELEMENTS = 1 << 24
"""Of all computed arrays together, or somewhat more."""

_MOST_VALUE_BYTES = 1 << 30
"""Of one value. Larger ones are no image network's, or an attempt to take the machine's memory."""

_MOST_CONSTANT_BYTES = 1 << 30
"""Of all values that do not depend on the image: onnxruntime computes these when it opens a graph, and keeps them."""

_MOST_SAYING_ELEMENTS = 256
"""Arrays of one dimension that are longer than this are no shapes."""

_FEW = 4096
"""Elements of which a graph may have as many arrays as it has nodes."""


@dataclass(slots=True)
class Facts:
    """What is known about the values of a graph for one input.

    Attributes:
        shapes: by value; not there where it is unknown.
        elements: of small values that are the same for every image of this shape.
        unknown: the values whose shape depends on the image's pixels, or that onnx does not understand.
        unbounded: those of them that may be of any size, and what is computed of these.
        misfit: the first node that onnx refuses, in words; empty if there is none.
    """

    shapes: dict[ir.Value, Shape] = field(default_factory=dict)
    elements: dict[ir.Value, Array] = field(default_factory=dict)
    unknown: set[ir.Value] = field(default_factory=set)
    unbounded: set[ir.Value] = field(default_factory=set)
    misfit: str = ""


def infer(model: ir.Model, image: ir.Value, shape: Shape) -> Facts:
    """Follow a graph from an input's shape on. Values get their element types.

    Args:
        model: from `read_file`.
        image: its input.
        shape: of it, with the number of images.

    Raises:
        ModelLoadError: a value is too large, or not a tensor, or an operator is unknown; names the node and the value.
    """
    facts, opset = Facts(), model.graph.opset_imports[""]
    facts.shapes[image] = shape
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            facts.shapes[value] = tuple(value.const_value.shape.numpy())
            if value.const_value.size <= MOST_CONSTANT_ELEMENTS:
                facts.elements[value] = value.const_value.numpy()
    run = _Run(facts, opset, image)
    _check_size(image, shape)
    for node in model.graph:
        run.follow(node)
    return facts


class _Run:
    """One pass over a graph."""

    def __init__(self, facts: Facts, opset: int, image: ir.Value) -> None:
        """Begin with what is known of inputs and constants."""
        self._facts = facts
        self._opset = opset
        self._from_image = {image}
        self._computed_elements = 0
        self._constant_bytes = 0
        self._said: dict[ir.Value, onnx.TensorProto] = {}

    def follow(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None]
        depends = not self._from_image.isdisjoint(inputs)
        if depends:
            self._from_image.update(node.outputs)
        if self._compute(node, small=True):
            return
        facts = self._facts
        found = self._types(node) if facts.unknown.isdisjoint(inputs) else {}
        for output in node.outputs:
            kind = found.get(str(output.name))
            if kind is None or not kind.tensor_type.HasField("shape") or not _is_whole(kind.tensor_type):
                if output.uses() or output.is_graph_output():
                    facts.unknown.add(output)
                continue
            facts.shapes[output] = tuple(dim.dim_value for dim in kind.tensor_type.shape.dim)
            size_bytes = _check_size(output, facts.shapes[output], node)
            if not depends:
                self._constant_bytes += size_bytes
        if self._constant_bytes > _MOST_CONSTANT_BYTES:
            raise ModelLoadError(f"{_about(node)}: the constants that the graph computes are too large")
        self._compute(node, small=False)
        if node.op_type in GROWING or not facts.unbounded.isdisjoint(inputs):
            facts.unbounded.update(facts.unknown.intersection(node.outputs))

    def _types(self, node: ir.Node) -> Mapping[str, onnx.TypeProto]:
        """The types of a node's outputs; none where onnx refuses the node."""
        types = {}
        for value in node.inputs:
            if value is None:
                continue
            if value.dtype is None or value not in self._facts.shapes:
                return {}
            types[str(value.name)] = onnx.helper.make_tensor_type_proto(int(value.dtype), self._facts.shapes[value])
        try:
            schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        # Of a class that is not public.
        except Exception as error:
            raise ModelLoadError(f"{_about(node)} is unknown in opset {self._opset}") from error
        said = {str(value.name): data for value in node.inputs if value is not None and (data := self._say(value))}
        try:
            found = onnx.shape_inference.infer_node_outputs(schema, ir.serde.serialize_node(node), types, said)
        # In C++, of several classes.
        except Exception:
            self._facts.misfit = self._facts.misfit or f"{_about(node)} does not fit its inputs"
            return {}
        for output in node.outputs:
            kind = found.get(str(output.name))
            if kind is not None and not kind.HasField("tensor_type"):
                raise ModelLoadError(f"{_about(node)}: {output.name!r} is no tensor")
            if kind is not None and kind.tensor_type.elem_type:
                output.type = ir.TensorType(ir.DataType(kind.tensor_type.elem_type))
        return found

    def _say(self, value: ir.Value) -> onnx.TensorProto | None:
        """The elements of a value that may say a shape, as inference reads them."""
        elements = self._facts.elements.get(value)
        if elements is None or elements.ndim > 1 or elements.size > _MOST_SAYING_ELEMENTS:
            return None
        if value not in self._said:
            self._said[value] = onnx.numpy_helper.from_array(elements)
        return self._said[value]

    def _compute(self, node: ir.Node, *, small: bool) -> bool:
        """Compute a node's outputs, where they follow from shapes and constants, and are few.

        Args:
            node: of the graph.
            small: whether that must be clear from its inputs; or else the shapes of its outputs are known if they
                can be.

        Returns:
            Whether that was possible.
        """
        facts = self._facts
        if node.op_type in {"Shape", "Size"}:
            found = self._lengths(node)
        else:
            inputs = [None if value is None else facts.elements.get(value) for value in node.inputs]
            missing = any(array is None and value is not None for array, value in zip(inputs, node.inputs, strict=True))
            if missing or not can_compute(node.op_type) or self._computed_elements > _MOST_COMPUTED_ELEMENTS:
                return False
            sizes = [array.size for array in inputs if array is not None]
            # The output of NonZero has a size that is not known before, and that its input's bounds.
            bounded = node.op_type not in GROWING and (math.prod(sizes) <= _FEW or node.op_type == "NonZero")
            if not bounded and (small or not all(self._is_small(output) for output in node.outputs)):
                return False
            try:
                found = compute(node, inputs)
            # Whatever numpy raises for inputs that do not fit: the runtime says what is wrong.
            except Exception:
                return False
        for output, elements in zip(node.outputs, found, strict=False):
            facts.elements[output], facts.shapes[output] = elements, elements.shape
            output.type = ir.TensorType(ir.DataType.from_numpy(elements.dtype))
            facts.unknown.discard(output)
            self._computed_elements += elements.size
        return bool(found)

    def _lengths(self, node: ir.Node) -> list[Array]:
        """The output of Shape or Size; nothing if it is not known."""
        shape = self._facts.shapes.get(node.inputs[0]) if node.inputs[0] is not None else None
        if shape is None:
            return []
        if node.op_type == "Size":
            return [np.array(math.prod(shape), np.int64)]
        end = node.attributes["end"].as_int() if "end" in node.attributes else None
        return [np.array(shape[node.attributes["start"].as_int() : end], np.int64)]

    def _is_small(self, value: ir.Value) -> bool:
        shape = self._facts.shapes.get(value)
        return shape is not None and math.prod(shape) <= MOST_CONSTANT_ELEMENTS


def _about(node: ir.Node) -> str:
    return f"operator {node.op_type} of node {node.name!r}"


def _is_whole(tensor: onnx.TypeProto.Tensor) -> bool:
    return all(dim.HasField("dim_value") for dim in tensor.shape.dim)


def _check_size(value: ir.Value, shape: Shape, node: ir.Node | None = None) -> int:
    """The bytes of a value.

    Raises:
        ModelLoadError: they are too many, or a length is negative.
    """
    size_bytes = math.prod(shape) * (value.dtype.bitwidth if value.dtype is not None else 32) // 8
    if min(shape, default=0) < 0 or size_bytes > _MOST_VALUE_BYTES:
        where = "input" if node is None else _about(node)
        raise ModelLoadError(f"{where}: {value.name!r} of shape {shape} is too large")
    return size_bytes
