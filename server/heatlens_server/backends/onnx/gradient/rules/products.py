"""Rules of products of matrices, and of normalisations."""

import string
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.rules.layout import along
from heatlens_server.backends.onnx.gradient.tape import (
    Gradients,
    NotDifferentiable,
    Rule,
    Shape,
    Tape,
    broadcast,
    by_first,
    input_of,
    only,
)

# Products.


def _swapped(value: ir.Value, rank: int, tape: Tape) -> ir.Value:
    """A matrix, or a stack of them, with its last two axes exchanged."""
    return tape.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])


def _mat_mul(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    operands = input_of(node, 0), input_of(node, 1)
    return product_gradients(only(gradients), operands, operands, tape)


def product_gradients(
    gradient: ir.Value, operands: tuple[ir.Value, ir.Value], numbers: tuple[ir.Value, ir.Value], tape: Tape
) -> list[ir.Value | None]:
    """The gradients of a product's operands.

    Args:
        gradient: of the product.
        operands: of the forward pass.
        numbers: what is multiplied: the operands, or, if these are integers, the numbers that they stand for.
        tape: to write on.
    """
    (a, b), (a_number, b_number) = operands, numbers
    a_shape, b_shape = tape.shape(a), tape.shape(b)
    # Vectors become matrices, as numpy's matmul makes them.
    if len(a_shape) == 1:
        gradient = tape.op("Unsqueeze", gradient, tape.ints(-1 if len(b_shape) == 1 else -2))
    if len(b_shape) == 1:
        gradient = tape.op("Unsqueeze", gradient, tape.ints(-1))
    rows, columns = (1, *a_shape) if len(a_shape) == 1 else a_shape, (*b_shape, 1) if len(b_shape) == 1 else b_shape
    stacks = broadcast(rows[:-2], columns[:-2]) if len(rows) > 2 or len(columns) > 2 else ()
    found: list[ir.Value | None] = [None, None]
    if tape.wanted(a):
        other = tape.op("Unsqueeze", b_number, tape.ints(-1)) if len(b_shape) == 1 else b_number
        product = tape.op("MatMul", gradient, _swapped(other, len(columns), tape))
        found[0] = _summed(product, (*stacks, *rows[-2:]), rows, a, tape)
    if tape.wanted(b):
        other = tape.op("Unsqueeze", a_number, tape.ints(0)) if len(a_shape) == 1 else a_number
        product = tape.op("MatMul", _swapped(other, len(rows), tape), gradient)
        found[1] = _summed(product, (*stacks, *columns[-2:]), columns, b, tape)
    return found


def _summed(gradient: ir.Value, source: Shape, matrix: Shape, like: ir.Value, tape: Tape) -> ir.Value:
    """Sum a product's gradient over stacks that were repeated, and make a vector of a vector's matrix again."""
    extra = len(source) - len(matrix)
    gradient = tape.sum(gradient, range(extra), keepdims=False)
    repeated = [axis for axis, length in enumerate(matrix[:-2]) if length == 1 and source[axis + extra] != 1]
    gradient = tape.sum(gradient, repeated, keepdims=True)
    return tape.reshape(gradient, like) if tape.rank(like) == 1 else gradient


def _gemm(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Y = alpha A' B' + beta C."""
    gradient, a, b = only(gradients), input_of(node, 0), input_of(node, 1)
    alpha = node.attributes["alpha"].as_float()
    turned_a, turned_b = node.attributes["transA"].as_int(), node.attributes["transB"].as_int()
    scaled = gradient if alpha == 1.0 else tape.op("Mul", gradient, tape.number(alpha))
    found: list[ir.Value | None] = [None] * len(node.inputs)
    if tape.wanted(a):
        # A = G B'^T, or its transpose: Gemm turns its operands for nothing.
        operands = (b, scaled) if turned_a else (scaled, b)
        found[0] = tape.op("Gemm", *operands, transA=turned_a and turned_b, transB=1 if turned_a else 1 - turned_b)
    if tape.wanted(b):
        operands = (scaled, a) if turned_b else (a, scaled)
        found[1] = tape.op("Gemm", *operands, transA=1 if turned_b else 1 - turned_a, transB=turned_b and turned_a)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and tape.wanted(bias):
        beta = tape.op("Mul", gradient, tape.number(node.attributes["beta"].as_float()))
        found[2] = tape.unbroadcast(beta, tape.shape(node.outputs[0]), bias)
    return found


def _einsum(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """An operand's gradient is an Einsum too: of the output's gradient and the other operands, to its own letters."""
    gradient = only(gradients)
    operands, result = _einsum_letters(node, tape)
    found: list[ir.Value | None] = []
    for place, term in enumerate(operands):
        value = input_of(node, place)
        if not tape.wanted(value):
            found.append(None)
            continue
        others = [(operands[i], input_of(node, i)) for i in range(len(operands)) if i != place]
        available = set(result).union(*(letters for letters, _ in others))
        # A letter of this operand alone was summed: its gradient is the same everywhere along it.
        kept = "".join(letter for letter in term if letter in available)
        inputs = ",".join([result, *(letters for letters, _ in others)])
        part = tape.op("Einsum", gradient, *(other for _, other in others), equation=f"{inputs}->{kept}")
        lost = [axis for axis, letter in enumerate(term) if letter not in available]
        found.append(tape.expand(tape.op("Unsqueeze", part, tape.ints(*lost)), value) if lost else part)
    return found


def _einsum_letters(node: ir.Node, tape: Tape) -> tuple[list[str], str]:
    """The letters of each operand and of the result, one per axis.

    Raises:
        NotDifferentiable: a letter stands twice in one operand, or for several lengths.
    """
    equation = node.attributes["equation"].as_string().replace(" ", "")
    terms, arrow, result = equation.partition("->")
    operands = terms.split(",")
    shapes = [tape.shape(input_of(node, place)) for place in range(len(operands))]
    if not arrow:
        result = "..." * ("." in terms) + "".join(
            sorted(one for one in set(terms) - {",", "."} if terms.count(one) == 1)
        )
    if "." in equation:
        spare = [letter for letter in string.ascii_letters if letter not in equation]
        # Aligned at their ends, as operands are broadcast.
        counts = [len(shape) - len(term.replace("...", "")) for term, shape in zip(operands, shapes, strict=True)]
        most = max(counts)
        operands = [
            term.replace("...", "".join(spare[most - count : most]))
            for term, count in zip(operands, counts, strict=True)
        ]
        result = result.replace("...", "".join(spare[:most]))
    lengths = {
        (letter, length)
        for term, shape in zip(operands, shapes, strict=True)
        for letter, length in zip(term, shape, strict=True)
    }
    if any(len(set(term)) < len(term) for term in operands) or len(lengths) > len(set("".join(operands))):
        raise NotDifferentiable(f"Einsum {equation!r}")
    return operands, result


# Normalisations.


def _per_channel(value: ir.Value, rank: int, tape: Tape) -> ir.Value:
    """A vector of one number per channel, to be broadcast over (N, C, ...)."""
    return tape.op("Reshape", value, tape.ints(-1, *[1] * (rank - 2)))


def _batch_normalization(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    if "training_mode" in node.attributes and node.attributes["training_mode"].as_int():
        raise NotDifferentiable("BatchNormalization in training mode")
    x, scale, variance = input_of(node, 0), input_of(node, 1), input_of(node, 4)
    root = tape.op("Sqrt", tape.op("Add", variance, tape.number(node.attributes["epsilon"].as_float())))
    factor = _per_channel(tape.op("Div", scale, root), tape.rank(x), tape)
    return by_first(node, tape.op("Mul", only(gradients), factor), tape)


def _standardised(gradient: ir.Value, x: ir.Value, axes: Sequence[int], epsilon: float, tape: Tape) -> ir.Value:
    """The gradient of (x - mean) / sqrt(variance + epsilon) over axes.

    With s the root and z the result: (g - mean(g) - z mean(g z)) / s.
    """
    centred = tape.op("Sub", x, tape.mean(x, axes))
    variance = tape.mean(tape.op("Mul", centred, centred), axes)
    root = tape.op("Sqrt", tape.op("Add", variance, tape.number(epsilon)))
    result = tape.op("Div", centred, root)
    shared = tape.op("Mul", result, tape.mean(tape.op("Mul", gradient, result), axes))
    rest = tape.op("Sub", tape.op("Sub", gradient, tape.mean(gradient, axes)), shared)
    return tape.op("Div", rest, root)


def _layer_normalization(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x, scale = input_of(node, 0), input_of(node, 1)
    rank = tape.rank(x)
    axes = list(range(node.attributes["axis"].as_int() % rank, rank))
    scaled = tape.op("Mul", only(gradients), scale)
    return by_first(node, _standardised(scaled, x, axes, node.attributes["epsilon"].as_float(), tape), tape)


def _instance_normalization(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x, scale = input_of(node, 0), input_of(node, 1)
    rank = tape.rank(x)
    scaled = tape.op("Mul", only(gradients), _per_channel(scale, rank, tape))
    epsilon = node.attributes["epsilon"].as_float()
    return by_first(node, _standardised(scaled, x, range(2, rank), epsilon, tape), tape)


def _lp_normalization(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """X / n, n the norm: (g - s sum(g y)) / n, with s = y for the Euclidean norm and sign(x) for that of magnitudes."""
    gradient, x, y = only(gradients), input_of(node, 0), node.outputs[0]
    axes, order = [node.attributes["axis"].as_int()], node.attributes["p"].as_int()
    kind = {1: "ReduceL1", 2: "ReduceL2"}[order]
    norm = tape.op(kind, x, tape.ints(*axes), keepdims=1)
    slope = y if order == 2 else tape.op("Sign", x)
    projected = tape.op("Mul", slope, tape.sum(tape.op("Mul", gradient, y), axes, keepdims=True))
    return [tape.op("Div", tape.op("Sub", gradient, projected), norm)]


def _lrn(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Y = x / d^b, d = k + (a / n) M x^2, M the band of n channels: g / d^b - 2 a b / n x M^T (g x d^(-b - 1))."""
    gradient, x = only(gradients), input_of(node, 0)
    shape = tape.shape(x)
    alpha, beta, bias = (node.attributes[name].as_float() for name in ("alpha", "beta", "bias"))
    size, channels = node.attributes["size"].as_int(), shape[1]
    places = np.arange(channels)
    offset = places[None, :] - places[:, None]
    # Element j counts for channel i if i - floor((n - 1) / 2) <= j <= i + ceil((n - 1) / 2).
    band = ((offset >= -((size - 1) // 2)) & (offset <= -(-(size - 1) // 2))).astype(np.float64)
    squares = along(tape.op("Mul", x, x), 1, band.T * (alpha / size), len(shape), tape)
    base = tape.op("Add", squares, tape.number(bias))
    own = tape.op("Div", gradient, tape.op("Pow", base, tape.number(beta)))
    weighted = tape.op("Div", tape.op("Mul", own, x), base)
    others = along(weighted, 1, band * (2.0 * alpha * beta / size), len(shape), tape)
    return [tape.op("Sub", own, tape.op("Mul", x, others))]


RULES: Mapping[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MatMul": _mat_mul,
}
"""By operator."""
