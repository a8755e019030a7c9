"""Whether gradients of an ONNX graph are right: by differences of its forward pass in float64. Needs no PyTorch.

The forward pass shares nothing with the rules of differentiation, so a rule that is wrong differs by about 1.
Differences are taken next to the activations and not at them: there, half of a ReLU's outputs are exactly 0, and equal
elements compete for a maximum.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Array, Known
from heatlens_server.backends.onnx.gradient.values import open_graph, part_of
from heatlens_server.backends.onnx.packed import OpenGraph
from heatlens_server.backends.onnx.passes import Passes
from heatlens_server.backends.onnx.source.float64 import Float64, in_float64

_DIRECTIONS = 4
_NOISE = 0.05
_STEPS = (1e-7, 1e-5, 1e-3, 1e-6)
"""Of differences, in standard deviations of the activations, and the best of them counts for each direction.

A longer one crosses more kinks, and a shorter one is less exact where scores hardly depend on the layer. A gradient
that is wrong is wrong by every one.
"""

_SURELY_RIGHT = 1e-5

GradientAt = Callable[[Mapping[str, Array], Mapping[str, Array]], Array]
"""From values of a forward pass and gradients of scores, both by name, to the gradient of a layer of one image."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a gradient is off.

    Attributes:
        forward_error: how far the scores of the forward pass in float64 are off from onnxruntime's, as a share of the
            largest. If it is not small, the rest says nothing.
        gradient_error: of the gradient, relative to its length: about 1e-7 to 1e-4 if it is right, and of the order of
            1 if a rule is wrong.
    """

    forward_error: float
    gradient_error: float


def judge(
    model: ir.Model,
    known: Known,
    *,
    layer: ir.Value,
    scores: Sequence[ir.Value],
    forward: Mapping[str, Array],
    gradient_at: GradientAt,
) -> Verdict:
    """Compare the gradient by a layer with differences along random directions.

    Rounding has no slope: quantisers are run without it, and clip, as rules of differentiation take them.

    Args:
        model: from `read_file`.
        known: about it.
        layer: a value of it.
        scores: values of it that depend on the layer. Their sum with random weights is differentiated.
        forward: of one image, by name: the input, and whatever other values of the forward pass are at hand.
        gradient_at: gives the gradient that is judged. It is told all values from the layer to the scores; those
            before the layer are `forward`'s.

    Raises:
        ModelLoadError: the graph cannot be run.
    """
    tail = _tail_of(model, known, layer, scores, forward)
    rng = np.random.default_rng(0)
    activations = tail.values[layer]
    there = tail.run(layer, activations, rounding=True)
    forward_error = max(_relative(there[score], tail.values[score]) for score in scores)
    spread = float(activations.std()) or 1.0
    point = activations + _NOISE * spread * rng.normal(size=activations.shape)
    weights = {score: rng.normal(size=tail.values[score].shape) for score in scores}

    def objective(at: Array) -> float:
        values = tail.run(layer, at, rounding=False)
        return sum(float(np.vdot(weight, values[score])) for score, weight in weights.items())

    here = tail.run(layer, point, rounding=False)
    told = {str(value.name): _as(array, there[value].dtype, known) for value, array in here.items()}
    dtype = known.dtype.numpy()
    seeds = {str(score.name): weight.astype(dtype) for score, weight in weights.items()}
    gradient = gradient_at(told, seeds).astype(np.float64)
    directions = [spread * rng.normal(size=activations.shape) for _ in range(_DIRECTIONS)]
    slopes = np.array([np.vdot(gradient, direction) for direction in directions])
    length, errors = spread * float(np.linalg.norm(gradient)), np.full(_DIRECTIONS, np.inf)
    for step in _STEPS:
        found = [
            (objective(point + step * direction) - objective(point - step * direction)) / (2.0 * step)
            for direction in directions
        ]
        errors = np.minimum(errors, np.abs(found - slopes))
        # A gradient that lacks a part is shorter than it should be.
        length = max(length, float(np.linalg.norm(found)) / _DIRECTIONS**0.5)
        error = float(np.linalg.norm(errors)) / _DIRECTIONS**0.5 / (length or 1.0)
        if error < _SURELY_RIGHT:
            break
    return Verdict(forward_error, error)


def gradient_by(passes: Passes, backward: OpenGraph, layer: str, forward: Mapping[str, Array]) -> GradientAt:
    """What `judge` judges of a network's graphs.

    Args:
        passes: the graphs.
        backward: that of the backward pass.
        layer: its name.
        forward: all outputs of the forward pass of one image, and its input, by name.
    """

    def gradient_at(values: Mapping[str, Array], seeds: Mapping[str, Array]) -> Array:
        kept = {name: values[name] if name in values else forward[name] for name in passes.kept}
        weights = {passes.seeds[name]: seed for name, seed in seeds.items()}
        return backward.run([passes.gradients[layer]], kept | weights)[0]

    return gradient_at


@dataclass(frozen=True, slots=True)
class _Tail:
    """The part of a graph from a layer to scores, in float64.

    Attributes:
        nodes: in the order in which they run.
        values: what they read, and the scores, as onnxruntime computed them.
        operators: run them.
    """

    nodes: Sequence[ir.Node]
    values: Mapping[ir.Value, Array]
    operators: Float64

    def run(self, layer: ir.Value, activations: Array, *, rounding: bool) -> dict[ir.Value, Array]:
        """The layer's values and all that follow from them."""
        found = {layer: activations}
        for node in self.nodes:
            inputs = [
                None if value is None else found[value] if value in found else self.values[value]
                for value in node.inputs
            ]
            found.update(zip(node.outputs, self.operators.run(node, inputs, rounding=rounding), strict=False))
        return found


def _tail_of(
    model: ir.Model, known: Known, layer: ir.Value, scores: Sequence[ir.Value], forward: Mapping[str, Array]
) -> _Tail:
    moving, needed = {layer}, set(scores)
    behind: list[ir.Node] = []
    nodes: list[ir.Node] = []
    for node in model.graph:
        if moving.intersection(node.inputs):
            moving.update(node.outputs)
            behind.append(node)
    for node in reversed(behind):
        if needed.intersection(node.outputs):
            needed.update(value for value in node.inputs if value is not None)
            nodes.insert(0, node)
    read = {value for node in nodes for value in node.inputs if value is not None and value not in moving}
    values = {value: value.const_value.numpy() for value in read if value.const_value is not None}
    others = [value for value in {layer, *scores, *read} if value not in values]
    values |= {value: forward[str(value.name)] for value in others if value.name in forward}
    missing = [value for value in others if value not in values]
    if missing:
        feeds = {str(value.name): forward[str(value.name)] for value in model.graph.inputs}
        values |= zip(missing, open_graph(part_of(model, missing)).run(None, feeds), strict=True)
    return _Tail(nodes, {value: in_float64(array) for value, array in values.items()}, Float64(known.opset))


def _relative(found: Array, expected: Array) -> float:
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / (largest or 1.0)


def _as(array: Array, dtype: np.dtype[Any], known: Known) -> Array:
    """A value of the type that it has in the graph."""
    if np.issubdtype(dtype, np.floating):
        return array.astype(known.dtype.numpy())
    return array if array.dtype == dtype else np.asarray(np.rint(array)).astype(dtype)
