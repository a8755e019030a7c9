"""Operators that onnxruntime's tools write, as ONNX's own: those of quantised networks, and activation functions.

An operator on integers becomes the same operator on numbers between DequantizeLinear and QuantizeLinear, which
onnxruntime fuses again when it opens the graph.
"""

from collections.abc import Callable, Mapping, Sequence

import onnx
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Known, Tape, input_of
from heatlens_server.core.errors import ModelLoadError

Inputs = Sequence[ir.Value | None]
Rewrite = Callable[[ir.Node, Tape], ir.Value]
"""Writes what an operator does with other ones; returns its output."""

_DOMAIN = "com.microsoft"
_OPSET_OF_QUANTISED = 21
"""The first in which QuantizeLinear has 16 and 4 bits, as onnxruntime's own has."""


_MOVES = frozenset(
    {"Flatten", "Gather", "MaxPool", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators of integers and of numbers that do the same to both."""


def is_rewritten(node: ir.Node | onnx.NodeProto) -> bool:
    """Whether an operator is one of those that `rewrite_runtime_operators` replaces."""
    return _key(node) in _REWRITES


def rewrite_runtime_operators(model: ir.Model) -> None:
    """Replace them in a sorted model of opset 13 or later, so that numbers alone are computed with.

    Raises:
        ModelLoadError: an operator has a form that is not understood; names it and the node.
    """
    for node in list(model.graph):
        tape = Tape(Known({}), lambda _value: False, prefix=str(node.outputs[0].name))
        if is_rewritten(node):
            results: Sequence[ir.Value] = [_rewritten(node, tape)]
            if node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
                model.graph.opset_imports[""] = max(model.graph.opset_imports[""], _OPSET_OF_QUANTISED)
        elif (quantiser := _moved_quantiser(node)) is not None:
            results = _moved(node, quantiser, tape)
        else:
            continue
        for value in tape.initializers:
            model.graph.register_initializer(value)
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, node.outputs, results)


def _rewritten(node: ir.Node, tape: Tape) -> ir.Value:
    try:
        return _REWRITES[_key(node)](node, tape)
    except ModelLoadError:
        raise
    # An input or attribute is missing, or there are too many.
    except Exception as error:
        raise ModelLoadError(f"operator {node.op_type} of node {node.name!r} is not as it must be") from error


def _moved_quantiser(node: ir.Node) -> ir.Node | None:
    """What makes the integers that an operator moves or chooses among; None if it does not, or they are none."""
    source = node.inputs[0] if node.op_type in _MOVES and node.inputs else None
    quantiser = None if source is None else source.producer()
    return quantiser if quantiser is not None and quantiser.op_type == "QuantizeLinear" else None


def _moved(node: ir.Node, quantiser: ir.Node, tape: Tape) -> list[ir.Value]:
    _x, *how = quantiser.inputs
    attributes = _attributes(quantiser)
    read = tape.op("DequantizeLinear", node.inputs[0], *how, **attributes)
    done = tape.ops(node.op_type, [read, *node.inputs[1:]], len(node.outputs), **_attributes(node))
    return [tape.op("QuantizeLinear", value, *how, **attributes) for value in done]


def _key(node: ir.Node | onnx.NodeProto) -> str:
    return node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"


def _attributes(node: ir.Node, *without: str) -> dict[str, ir.Attr]:
    return {name: attribute.value for name, attribute in node.attributes.items() if name not in without}


def _float(inputs: Inputs, tape: Tape, axis: int = 0) -> ir.Value:
    """The number that an integer stands for, of (integers, scale, zero point); a scale per element of the axis."""
    integers, scale, zero_point = inputs
    return tape.op("DequantizeLinear", integers, scale, zero_point, axis=axis)


def _integer(value: ir.Value, scale: ir.Value | None, zero_point: ir.Value | None, tape: Tape) -> ir.Value:
    return tape.op("QuantizeLinear", value, scale, zero_point)


def _between(name: str, operands: int) -> Rewrite:
    """An operator of some operands: (integers, scale, zero point) of each, then the output's scale and zero point."""

    def rewrite(node: ir.Node, tape: Tape) -> ir.Value:
        if "channels_last" in node.attributes and node.attributes["channels_last"].as_int():
            raise ModelLoadError(f"operator {node.op_type} of node {node.name!r}: channels_last is not understood")
        # A product's second operand has a scale per column.
        axis = -1 if name == "MatMul" else 0
        read = [_float(node.inputs[3 * place : 3 * place + 3], tape, axis) for place in range(operands)]
        done = tape.op(name, *read, **_attributes(node, "channels_last"))
        return _integer(done, *_pair(node, 3 * operands), tape)

    return rewrite


def _pair(node: ir.Node, place: int) -> tuple[ir.Value | None, ir.Value | None]:
    scale, zero_point, *_others = [*node.inputs[place:], None, None]
    return scale, zero_point


def _bias(value: ir.Value | None, scale: ir.Value | None, other: ir.Value | None, tape: Tape) -> ir.Value | None:
    """A convolution's bias, whose scale is the product of those of its operands."""
    return None if value is None else tape.op("DequantizeLinear", value, tape.op("Mul", scale, other), axis=0)


def _conv(node: ir.Node, tape: Tape) -> ir.Value:
    x, scale, zero_point, weights, weight_scale, weight_zero_point, _scale, _zero_point, bias, *_ = [*node.inputs, None]
    operands = [_float([x, scale, zero_point], tape), _float([weights, weight_scale, weight_zero_point], tape)]
    done = tape.op("Conv", *operands, _bias(bias, scale, weight_scale, tape), **_attributes(node))
    return _integer(done, *_pair(node, 6), tape)


def _gemm(node: ir.Node, tape: Tape) -> ir.Value:
    a, b = node.inputs[:3], node.inputs[3:6]
    axis = 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.0
    bias = node.inputs[6] if len(node.inputs) > 6 else None
    # The bias was divided by alpha with the scale that it has.
    operands = [_float(a, tape), _float(b, tape, axis), _bias(bias, a[1], b[1], tape)]
    done = tape.op("Gemm", *operands, **{**_attributes(node), "beta": alpha})
    scale, zero_point = _pair(node, 7)
    return done if scale is None else _integer(done, scale, zero_point, tape)


def _concat(node: ir.Node, tape: Tape) -> ir.Value:
    operands = [_float(node.inputs[place : place + 3], tape) for place in range(2, len(node.inputs), 3)]
    return _integer(tape.op("Concat", *operands, **_attributes(node)), *_pair(node, 0), tape)


def _where(node: ir.Node, tape: Tape) -> ir.Value:
    operands = [_float(node.inputs[place : place + 3], tape) for place in (1, 4)]
    return _integer(tape.op("Where", node.inputs[0], *operands), *_pair(node, 7), tape)


def _softmax(node: ir.Node, tape: Tape) -> ir.Value:
    """Before opset 13, Softmax is over the given axis and all behind it."""
    x = _float(node.inputs[:3], tape)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    if node.attributes["opset"].as_int() >= 13:
        done = tape.op("Softmax", x, axis=axis)
    else:
        flat = tape.op("Softmax", tape.op("Flatten", x, axis=axis), axis=-1)
        done = tape.op("Reshape", flat, tape.op("Shape", x))
    return _integer(done, *_pair(node, 3), tape)


def _renamed(name: str, **attributes: str) -> Rewrite:
    """The same operator under ONNX's name."""
    return lambda node, tape: tape.op(name, *node.inputs, **{**_attributes(node), **attributes})


def _of_sum(name: str, **attributes: str) -> Rewrite:
    """An activation of the first input, to which a bias is added if there is one."""

    def rewrite(node: ir.Node, tape: Tape) -> ir.Value:
        x = input_of(node)
        bias = node.inputs[1] if len(node.inputs) > 1 else None
        return tape.op(name, x if bias is None else tape.op("Add", x, bias), **attributes)

    return rewrite


def _quick_gelu(node: ir.Node, tape: Tape) -> ir.Value:
    """X * sigmoid(alpha x)."""
    x = input_of(node)
    alpha = node.attributes["alpha"].as_float() if "alpha" in node.attributes else 1.702
    return tape.op("Mul", x, tape.op("Sigmoid", tape.op("Mul", x, tape.number(alpha))))


_REWRITES: Mapping[str, Rewrite] = {
    "QLinearConv": _conv,
    "QLinearMatMul": _between("MatMul", 2),
    f"{_DOMAIN}.BiasGelu": _of_sum("Gelu"),
    f"{_DOMAIN}.DequantizeLinear": _renamed("DequantizeLinear"),
    f"{_DOMAIN}.FastGelu": _of_sum("Gelu", approximate="tanh"),
    f"{_DOMAIN}.Gelu": _of_sum("Gelu"),
    f"{_DOMAIN}.GridSample": _renamed("GridSample"),
    f"{_DOMAIN}.QGemm": _gemm,
    f"{_DOMAIN}.QLinearAdd": _between("Add", 2),
    f"{_DOMAIN}.QLinearAveragePool": _between("AveragePool", 1),
    f"{_DOMAIN}.QLinearConcat": _concat,
    f"{_DOMAIN}.QLinearGlobalAveragePool": _between("GlobalAveragePool", 1),
    f"{_DOMAIN}.QLinearLeakyRelu": _between("LeakyRelu", 1),
    f"{_DOMAIN}.QLinearMul": _between("Mul", 2),
    f"{_DOMAIN}.QLinearSigmoid": _between("Sigmoid", 1),
    f"{_DOMAIN}.QLinearSoftmax": _softmax,
    f"{_DOMAIN}.QLinearWhere": _where,
    f"{_DOMAIN}.QuantizeLinear": _renamed("QuantizeLinear"),
    f"{_DOMAIN}.QuickGelu": _quick_gelu,
    f"{_DOMAIN}.Trilu": _renamed("Trilu"),
}
"""By operator, with its domain."""
