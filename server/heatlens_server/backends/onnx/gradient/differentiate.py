"""The backward pass of a part of a graph, from the gradients of some values to those of others."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.rules import elementwise, layout, products, quantised, sampling, windows
from heatlens_server.backends.onnx.gradient.tape import Gradients, Known, NotDifferentiable, Rule, Tape

RULES: Mapping[str, Rule] = {
    **elementwise.RULES,
    **layout.RULES,
    **products.RULES,
    **quantised.RULES,
    **sampling.RULES,
    **windows.RULES,
}
"""By operator of ONNX's own domain."""

_WITHOUT_GRADIENT = frozenset(
    {
        *("And", "ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Ceil"),
        *("ConstantOfShape", "Equal", "EyeLike", "Floor", "Greater", "GreaterOrEqual", "Hardmax", "IsInf", "IsNaN"),
        *("Less", "LessOrEqual", "NonMaxSuppression", "NonZero", "Not", "OneHot", "Or", "RandomNormalLike"),
        *("RandomUniformLike", "Range", "Round", "Shape", "Sign", "Size", "Xor"),
    }
)
"""Operators whose outputs do not change where their inputs change a little, or hold no elements of them."""

_ONE_MOVES = frozenset({"Dropout", "DynamicQuantizeLinear", "MaxPool", "TopK"})
"""Operators of which the first output alone changes: the others are places, or masks, or count as constants."""


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward pass.

    Attributes:
        nodes: in the order in which they run.
        initializers: the constants that they read.
        gradients: by value that was asked for; None where nothing depends on it.
    """

    nodes: tuple[ir.Node, ...]
    initializers: tuple[ir.Value, ...]
    gradients: Mapping[ir.Value, ir.Value | None]


def differentiate(
    nodes: Sequence[ir.Node],
    seeds: Mapping[ir.Value, ir.Value],
    by: Sequence[ir.Value],
    known: Known,
    *,
    constants: Collection[ir.Value] = (),
    prefix: str = "gradient",
) -> Backward:
    """Write the backward pass of a forward pass.

    Args:
        nodes: the forward pass, or any part of it that holds all ways from `by` to the seeds, in the order in which
            it runs; its attributes have their defaults filled in.
        seeds: by value, the gradient of what is differentiated by it.
        by: what to differentiate by.
        known: about the forward pass.
        constants: values that count as such, though they are computed: no gradient goes through them.
        prefix: of new names.

    Raises:
        NotDifferentiable: an operator on the way has no rule; names it and the node.
    """
    moving = depending(nodes, by, constants)
    tape = Tape(known, moving.__contains__, prefix=prefix)
    parts: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    for value, seed in seeds.items():
        parts[value].append(seed)
    for node in reversed(nodes):
        if not _is_on_the_way(node, moving):
            continue
        gradients = [_sum(parts[output], tape) for output in node.outputs]
        if any(gradient is not None for gradient in gradients):
            for source, part in zip(node.inputs, _by_rule(node, gradients, tape), strict=False):
                if source is not None and part is not None and source in moving:
                    parts[source].append(part)
    found = {value: _sum(parts[value], tape) for value in by}
    return Backward(tuple(tape.nodes), tuple(tape.initializers), found)


def _is_on_the_way(node: ir.Node, moving: set[ir.Value]) -> bool:
    return not moving.isdisjoint(node.outputs) and not moving.isdisjoint(node.inputs)


def _rule_of(node: ir.Node) -> Rule | None:
    return RULES.get(node.op_type) if node.domain in {"", "ai.onnx"} else None


def _name_of(node: ir.Node) -> str:
    return node.op_type if node.domain in {"", "ai.onnx"} else f"{node.domain}.{node.op_type}"


def _by_rule(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    rule = _rule_of(node)
    if rule is None:
        raise NotDifferentiable(f"operator {_name_of(node)} of node {node.name!r} cannot be differentiated")
    try:
        return rule(node, gradients, tape)
    except NotDifferentiable as error:
        raise NotDifferentiable(f"node {node.name!r} cannot be differentiated: {error}") from error


def depending(nodes: Sequence[ir.Node], by: Sequence[ir.Value], constants: Collection[ir.Value] = ()) -> set[ir.Value]:
    """The values that change where those of `by` change a little, and these, if some count as constants."""
    moving = set(by)
    for node in nodes:
        if node.op_type in _WITHOUT_GRADIENT or not any(value in moving for value in node.inputs):
            continue
        if node.op_type == "Cast" and not ir.DataType(node.attributes["to"].as_int()).is_floating_point():
            continue
        moving.update(node.outputs[:1] if node.op_type in _ONE_MOVES else node.outputs)
        moving.difference_update(constants)
    return moving


def _sum(parts: list[ir.Value], tape: Tape) -> ir.Value | None:
    """The sum of the gradients that reached a value, kept as one; None if there is none."""
    if len(parts) > 1:
        parts[:] = [tape.op("Sum", *parts)]
    return parts[0] if parts else None
