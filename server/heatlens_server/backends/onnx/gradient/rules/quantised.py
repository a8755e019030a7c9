"""Rules of quantised networks: straight through the rounding, but 0 where the quantiser clips.

The gradient by an integer is that by the number it is computed from, as if nothing were rounded (the straight-through
estimator of Bengio, Leonard and Courville, arXiv:1308.3432). Quantisers clip on purpose: onnxruntime's tool takes out a
ReLU behind a convolution, as the quantiser of unsigned numbers does its work.
"""

from collections.abc import Mapping

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.rules.products import product_gradients
from heatlens_server.backends.onnx.gradient.rules.windows import conv_gradient
from heatlens_server.backends.onnx.gradient.tape import (
    Gradients,
    NotDifferentiable,
    Rule,
    Tape,
    by_first,
    input_of,
    only,
)


def _quantize_linear(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Y = clip(round(x / scale) + zero point): the slope is 1 / scale between the least and the largest number."""
    x, scale = input_of(node), _per_axis(node, input_of(node, 1), tape)
    zero_point = _optional(node, 2)
    low, high = _range_of(node, zero_point)
    ends = [tape.number(low), tape.number(high)]
    if zero_point is not None:
        shift = _per_axis(node, zero_point, tape)
        ends = [tape.op("Sub", end, shift) for end in ends]
    least, largest = (tape.op("Mul", end, scale) for end in ends)
    clipped = tape.op("Min", tape.op("Max", x, least), largest)
    mask = tape.cast(tape.op("Equal", x, clipped))
    return by_first(node, tape.op("Mul", tape.op("Div", only(gradients), scale), mask), tape)


def _dequantize_linear(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """X = (y - zero point) * scale."""
    return by_first(node, tape.op("Mul", only(gradients), _per_axis(node, input_of(node, 1), tape)), tape)


def _dynamic_quantize_linear(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """The scale, which is computed such that nothing is clipped, counts as a constant."""
    return [tape.op("Div", only(gradients), node.outputs[1])]


def _optional(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _per_axis(node: ir.Node, value: ir.Value, tape: Tape) -> ir.Value:
    """A quantiser's scale or zero point, one or one for each element of an axis, to be broadcast over its input."""
    if "block_size" in node.attributes and node.attributes["block_size"].as_int():
        raise NotDifferentiable(f"{node.op_type} of blocks")
    number, rank = tape.cast(value), tape.rank(input_of(node))
    if tape.shape(value) in {(), (1,)}:
        return tape.op("Reshape", number, tape.ints())
    axis = node.attributes["axis"].as_int() % rank
    return tape.op("Reshape", number, tape.ints(*(-1 if place == axis else 1 for place in range(rank))))


def _range_of(node: ir.Node, zero_point: ir.Value | None) -> tuple[float, float]:
    """The least and the largest number of a quantiser's output type."""
    given = node.attributes["output_dtype"].as_int() if "output_dtype" in node.attributes else 0
    kind = zero_point.dtype if zero_point is not None else ir.DataType(given or ir.DataType.UINT8)
    if kind is None or not kind.is_integer():
        raise NotDifferentiable(f"QuantizeLinear to {'an unknown type' if kind is None else kind.name}")
    return (
        (-(2.0 ** (kind.bitwidth - 1)), 2.0 ** (kind.bitwidth - 1) - 1)
        if kind.is_signed()
        else (0.0, 2.0**kind.bitwidth - 1)
    )


# Products of integers.


def _shifted(value: ir.Value, zero_point: ir.Value | None, tape: Tape, *lengths: int) -> ir.Value:
    """Integers as numbers less their zero point, whose shape becomes `lengths` if it is not one number."""
    number = tape.cast(value)
    if zero_point is None:
        return number
    shift = tape.cast(zero_point)
    if tape.shape(zero_point) not in {(), (1,)}:
        shift = tape.op("Reshape", shift, tape.ints(*lengths))
    return tape.op("Sub", number, shift)


def _mat_mul_integer(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    a, b = input_of(node, 0), input_of(node, 1)
    # A zero point for each row of the first matrix, or for each column of the second.
    numbers = _shifted(a, _optional(node, 2), tape, -1, 1), _shifted(b, _optional(node, 3), tape, 1, -1)
    found = product_gradients(only(gradients), (a, b), numbers, tape)
    return [*found, *[None] * (len(node.inputs) - 2)]


def _conv_integer(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    weights = input_of(node, 1)
    numbers = _shifted(weights, _optional(node, 3), tape, -1, *[1] * (tape.rank(weights) - 1))
    return by_first(node, conv_gradient(node, only(gradients), numbers, tape), tape)


RULES: Mapping[str, Rule] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "MatMulInteger": _mat_mul_integer,
    "QuantizeLinear": _quantize_linear,
}
"""By operator."""
