"""Rules of operators on single elements: arithmetic, and activation functions.

At kinks they follow PyTorch: the gradient of ReLU at 0 is 0, and equal operands of a maximum share its gradient.
"""

import math
from collections.abc import Callable, Mapping

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Gradients, NotDifferentiable, Rule, Tape, broadcast, only


def _inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of an operator that takes no absent ones."""
    return [value for value in node.inputs if value is not None]


def _broadcasting(terms: Callable[[ir.Node, ir.Value, Tape, int], ir.Value]) -> Rule:
    """A rule of an operator that broadcasts.

    Args:
        terms: from the node, the output's gradient, the tape and an input's place to that input's gradient, of the
            output's shape.
    """

    def rule(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
        gradient, inputs = only(gradients), _inputs(node)
        source = broadcast(*(tape.shape(value) for value in inputs))
        return [
            tape.unbroadcast(terms(node, gradient, tape, place), source, value) if tape.wanted(value) else None
            for place, value in enumerate(inputs)
        ]

    return rule


def _add(_node: ir.Node, gradient: ir.Value, _tape: Tape, _place: int) -> ir.Value:
    return gradient


def _sub(_node: ir.Node, gradient: ir.Value, tape: Tape, place: int) -> ir.Value:
    return tape.op("Neg", gradient) if place else gradient


def _mul(node: ir.Node, gradient: ir.Value, tape: Tape, place: int) -> ir.Value:
    return tape.op("Mul", gradient, node.inputs[1 - place])


def _div(node: ir.Node, gradient: ir.Value, tape: Tape, place: int) -> ir.Value:
    shared = tape.op("Div", gradient, node.inputs[1])
    return tape.op("Neg", tape.op("Mul", shared, node.outputs[0])) if place else shared


def _pow(node: ir.Node, gradient: ir.Value, tape: Tape, place: int) -> ir.Value:
    base, exponent = node.inputs
    if place:
        return tape.op("Mul", gradient, tape.op("Mul", node.outputs[0], tape.op("Log", base)))
    known = tape.array(exponent)
    if known is not None and known.size == 1:
        power = float(known.ravel()[0])
        if power == 2.0:
            return tape.op("Mul", gradient, tape.op("Mul", base, tape.number(2.0)))
        slope = tape.op("Mul", tape.op("Pow", base, tape.number(power - 1.0)), tape.number(power))
        return tape.op("Mul", gradient, slope)
    as_float = tape.cast(exponent) if exponent is not None else None
    lower = tape.op("Pow", base, tape.op("Sub", as_float, tape.number(1.0)))
    return tape.op("Mul", gradient, tape.op("Mul", as_float, lower))


def _mean(node: ir.Node, gradient: ir.Value, tape: Tape, _place: int) -> ir.Value:
    return tape.op("Div", gradient, tape.number(len(node.inputs)))


def _extreme(node: ir.Node, gradient: ir.Value, tape: Tape, place: int) -> ir.Value:
    """Max and Min: operands that are equal to the result share its gradient."""
    masks = [tape.cast(tape.op("Equal", value, node.outputs[0])) for value in node.inputs]
    if len(masks) == 1:
        return gradient
    return tape.op("Div", tape.op("Mul", gradient, masks[place]), tape.op("Sum", *masks))


def _where(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    gradient = only(gradients)
    condition, *branches = _inputs(node)
    source = broadcast(*(tape.shape(value) for value in node.inputs if value is not None))
    found: list[ir.Value | None] = [None]
    for place, value in enumerate(branches):
        if not tape.wanted(value):
            found.append(None)
            continue
        chosen = tape.op("Not", condition) if place else condition
        # Several times faster in onnxruntime than choosing between the gradient and zero.
        found.append(tape.unbroadcast(tape.op("Mul", gradient, tape.cast(chosen)), source, value))
    return found


def _unary(slope: Callable[[ir.Node, ir.Value, ir.Value, Tape], ir.Value]) -> Rule:
    """A rule of a function of one tensor.

    Args:
        slope: from the node, its input x, its output y and the tape to dy/dx.
    """

    def rule(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
        (x,) = _inputs(node)[:1]
        product = tape.op("Mul", only(gradients), slope(node, x, node.outputs[0], tape))
        return [product, *[None] * (len(node.inputs) - 1)]

    return rule


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float()


def _above(tape: Tape, value: ir.Value, threshold: float) -> ir.Value:
    """1 where a value is above a threshold, else 0."""
    return tape.cast(tape.op("Greater", value, tape.number(threshold)))


def _one_minus(tape: Tape, value: ir.Value) -> ir.Value:
    return tape.op("Sub", tape.number(1.0), value)


def _pieces(tape: Tape, x: ir.Value, above: ir.Value, below: ir.Value) -> ir.Value:
    """One slope where x > 0, and another elsewhere."""
    return tape.op("Where", tape.op("Greater", x, tape.number(0.0)), above, below)


def _elu(node: ir.Node, x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    return _pieces(tape, x, tape.number(1.0), tape.op("Add", y, tape.number(_float(node, "alpha"))))


def _celu(node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    # Not above 0, where Exp might overflow and the other branch is taken.
    below = tape.op("Min", x, tape.number(0.0))
    return _pieces(tape, x, tape.number(1.0), tape.op("Exp", tape.op("Div", below, tape.number(_float(node, "alpha")))))


def _selu(node: ir.Node, x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    alpha, gamma = _float(node, "alpha"), _float(node, "gamma")
    return _pieces(tape, x, tape.number(gamma), tape.op("Add", y, tape.number(alpha * gamma)))


def _leaky_relu(node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    return _pieces(tape, x, tape.number(1.0), tape.number(_float(node, "alpha")))


def _prelu(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    gradient = only(gradients)
    x, slope = _inputs(node)
    if tape.wanted(slope):
        raise NotDifferentiable("PRelu, by its slope")
    return [tape.op("Mul", gradient, _pieces(tape, x, tape.number(1.0), slope)), None]


def _sigmoid(_node: ir.Node, _x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    return tape.op("Mul", y, _one_minus(tape, y))


def _hard_sigmoid(node: ir.Node, _x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    inside = tape.op("And", tape.op("Greater", y, tape.number(0.0)), tape.op("Less", y, tape.number(1.0)))
    return tape.op("Mul", tape.cast(inside), tape.number(_float(node, "alpha")))


def _hard_swish(_node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    """X * clip(x / 6 + 1/2, 0, 1): 0 below -3, 1 above 3, x / 3 + 1/2 between."""
    between = tape.op("Add", tape.op("Div", x, tape.number(3.0)), tape.number(0.5))
    low = tape.op("Where", tape.op("Less", x, tape.number(-3.0)), tape.number(0.0), between)
    return tape.op("Where", tape.op("Greater", x, tape.number(3.0)), tape.number(1.0), low)


def _mish(_node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    """X * t, t = tanh(softplus(x)): t + x * sigmoid(x) * (1 - t^2)."""
    tanh = tape.op("Tanh", tape.op("Softplus", x))
    rest = tape.op("Mul", tape.op("Sigmoid", x), _one_minus(tape, tape.op("Mul", tanh, tanh)))
    return tape.op("Add", tanh, tape.op("Mul", x, rest))


def _swish(node: ir.Node, x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    """X * s, s = sigmoid(alpha x): s + alpha y (1 - s)."""
    alpha = tape.number(_float(node, "alpha"))
    sigmoid = tape.op("Sigmoid", tape.op("Mul", x, alpha))
    return tape.op("Add", sigmoid, tape.op("Mul", tape.op("Mul", y, alpha), _one_minus(tape, sigmoid)))


def _gelu(node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    if node.attributes["approximate"].as_string() == "tanh":
        return _gelu_by_tanh(x, tape)
    scaled = tape.op("Mul", x, tape.number(1.0 / math.sqrt(2.0)))
    distribution = tape.op("Mul", tape.op("Add", tape.op("Erf", scaled), tape.number(1.0)), tape.number(0.5))
    bell = tape.op("Exp", tape.op("Neg", tape.op("Mul", scaled, scaled)))
    density = tape.op("Mul", bell, tape.number(1.0 / math.sqrt(2.0 * math.pi)))
    return tape.op("Add", distribution, tape.op("Mul", x, density))


def _gelu_by_tanh(x: ir.Value, tape: Tape) -> ir.Value:
    """X (1 + t) / 2, t = tanh(c (x + a x^3)): (1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2."""
    cubic, factor = 0.044715, math.sqrt(2.0 / math.pi)
    square = tape.op("Mul", x, x)
    inner = tape.op("Mul", x, tape.op("Add", tape.op("Mul", square, tape.number(cubic * factor)), tape.number(factor)))
    tanh = tape.op("Tanh", inner)
    slope = tape.op("Add", tape.op("Mul", square, tape.number(3.0 * cubic * factor)), tape.number(factor))
    rest = tape.op("Mul", tape.op("Mul", x, _one_minus(tape, tape.op("Mul", tanh, tanh))), slope)
    return tape.op("Mul", tape.op("Add", tape.op("Add", tanh, tape.number(1.0)), rest), tape.number(0.5))


def _softsign(_node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    one_more = tape.op("Add", tape.op("Abs", x), tape.number(1.0))
    return tape.op("Reciprocal", tape.op("Mul", one_more, one_more))


def _erf(_node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    return tape.op("Mul", tape.op("Exp", tape.op("Neg", tape.op("Mul", x, x))), tape.number(2.0 / math.sqrt(math.pi)))


def _clip(_node: ir.Node, x: ir.Value, y: ir.Value, tape: Tape) -> ir.Value:
    return tape.cast(tape.op("Equal", x, y))


def _shrink(node: ir.Node, x: ir.Value, _y: ir.Value, tape: Tape) -> ir.Value:
    return _above(tape, tape.op("Abs", x), _float(node, "lambd"))


def _softmax(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Y (g - sum(g y)) along the axis."""
    gradient, y = only(gradients), node.outputs[0]
    weighted = tape.op("Mul", gradient, y)
    total = tape.sum(weighted, [node.attributes["axis"].as_int()], keepdims=True)
    return [tape.op("Sub", weighted, tape.op("Mul", y, total))]


def _log_softmax(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """G - exp(y) sum(g) along the axis."""
    gradient = only(gradients)
    total = tape.sum(gradient, [node.attributes["axis"].as_int()], keepdims=True)
    return [tape.op("Sub", gradient, tape.op("Mul", tape.op("Exp", node.outputs[0]), total))]


def _of(name: str, *, of_output: bool = False) -> Callable[[ir.Node, ir.Value, ir.Value, Tape], ir.Value]:
    """A slope that is one operator, of the input or the output."""
    return lambda _node, x, y, tape: tape.op(name, y if of_output else x)


def _square_of_output(factor: float) -> Callable[[ir.Node, ir.Value, ir.Value, Tape], ir.Value]:
    """Factor * y^2."""
    return lambda _node, _x, y, tape: tape.op("Mul", tape.op("Mul", y, y), tape.number(factor))


_SLOPES: Mapping[str, Callable[[ir.Node, ir.Value, ir.Value, Tape], ir.Value]] = {
    "Abs": _of("Sign"),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": lambda _node, x, _y, tape: tape.op("Neg", tape.op("Sin", x)),
    "Elu": _elu,
    "Erf": _erf,
    "Exp": lambda _node, _x, y, _tape: y,
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "LeakyRelu": _leaky_relu,
    "Log": _of("Reciprocal"),
    "Mish": _mish,
    "Neg": lambda _node, _x, _y, tape: tape.number(-1.0),
    "Reciprocal": _square_of_output(-1.0),
    "Relu": lambda _node, _x, y, tape: _above(tape, y, 0.0),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _sigmoid,
    "Sin": _of("Cos"),
    "Softplus": _of("Sigmoid"),
    "Softsign": _softsign,
    "Sqrt": lambda _node, _x, y, tape: tape.op("Div", tape.number(0.5), y),
    "Swish": _swish,
    "Tanh": lambda _node, _x, y, tape: _one_minus(tape, tape.op("Mul", y, y)),
    "ThresholdedRelu": lambda node, x, _y, tape: _above(tape, x, _float(node, "alpha")),
}

RULES: Mapping[str, Rule] = {
    **{name: _unary(slope) for name, slope in _SLOPES.items()},
    "Add": _broadcasting(_add),
    "Div": _broadcasting(_div),
    "LogSoftmax": _log_softmax,
    "Max": _broadcasting(_extreme),
    "Mean": _broadcasting(_mean),
    "Min": _broadcasting(_extreme),
    "Mul": _broadcasting(_mul),
    "PRelu": _prelu,
    "Pow": _broadcasting(_pow),
    "Softmax": _softmax,
    "Sub": _broadcasting(_sub),
    "Sum": _broadcasting(_add),
    "Where": _where,
}
"""By operator."""
