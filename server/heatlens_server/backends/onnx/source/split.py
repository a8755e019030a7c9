"""From an ONNX graph to its forward pass, the backward pass of its tail, and its tail alone, as graphs of their own."""

from collections.abc import Mapping, Sequence

import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.differentiate import Backward, differentiate
from heatlens_server.backends.onnx.gradient.file import skeleton_of
from heatlens_server.backends.onnx.gradient.tape import BATCH, Known, NotDifferentiable, Shape
from heatlens_server.backends.onnx.gradient.values import pack
from heatlens_server.backends.onnx.passes import Passes, Tail


def split(
    model: ir.Model,
    known: Known,
    image: ir.Value,
    scores: Sequence[ir.Value],
    layers: Sequence[ir.Value],
    *,
    looked_at: Sequence[ir.Value] = (),
    gradients: bool = True,
) -> Passes:
    """Write the forward pass and the backward pass of some layers.

    Args:
        model: from `read_file`; stays as it is.
        known: its shapes.
        image: its input.
        scores: values of it.
        layers: values of it, on which the scores depend.
        looked_at: values of it that come with the scores, and are not differentiated.
        gradients: whether a backward pass is needed.

    Raises:
        NotDifferentiable: an operator between them has no rule, or the scores do not depend on a layer.
    """
    names = {value: str(value.name) for value in (*scores, *looked_at, *layers)}
    by_layer = {names[value]: names[value] for value in layers}
    scored = tuple(names[value] for value in (*scores, *looked_at))
    if not gradients:
        forward = pack(forward_of(model, (*scores, *looked_at, *layers)))
        return Passes(forward, None, str(image.name), scored, by_layer, (), {}, {})
    seeds = {value: _like(value, f"seed: {names[value]}", known) for value in scores}
    backward = differentiate(list(model.graph), seeds, layers, known)
    missing = [names[value] for value in layers if backward.gradients[value] is None]
    if missing:
        raise NotDifferentiable(f"the scores do not depend on {missing[0]!r}")
    kept = _kept(backward, [*seeds.values()])
    forward_model = forward_of(model, (*scores, *looked_at, *layers, *kept))
    found = {value: gradient for value, gradient in backward.gradients.items() if gradient is not None}
    backward_model = _backward(backward, found, seeds, _typed(forward_model, kept, known), known)
    return Passes(
        forward=pack(forward_model),
        backward=pack(backward_model),
        image=str(image.name),
        scores=scored,
        layers=by_layer,
        kept=tuple(str(value.name) for value in kept),
        seeds={names[value]: str(seed.name) for value, seed in seeds.items()},
        gradients={names[value]: f"gradient: {names[value]}" for value in layers},
    )


def tail_of(model: ir.Model, known: Known, image: ir.Value, scores: Sequence[ir.Value], layer: ir.Value) -> Tail:
    """Write what comes behind a layer. No operator of it needs a rule.

    Args:
        model: from `read_file`; stays as it is.
        known: its shapes.
        image: its input.
        scores: values of it.
        layer: a value of it.
    """
    kept = _bypassing(model, known, scores, layer)
    copy = model.clone()
    values = {value.name: value for value in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    copy.graph.outputs[:] = [values[value.name] for value in scores]
    given = []
    for value in (layer, *kept):
        given.append(_like(value, str(value.name), known, value.dtype))
        values[value.name].replace_all_uses_with(given[-1])
        # What computed it may stay for the sake of another output.
        values[value.name].name = f"{value.name}: computed"
    copy.graph.inputs[:] = given
    common.RemoveUnusedNodesPass()(copy)
    computed = [value for value in kept if value is not image]
    return Tail(
        graph=pack(copy),
        layer=str(layer.name),
        scores=tuple(str(value.name) for value in scores),
        kept={str(value.name): axis for value, axis in kept.items()},
        before=pack(forward_of(model, computed)) if computed else None,
        image=str(image.name),
    )


def _bypassing(model: ir.Model, known: Known, scores: Sequence[ir.Value], layer: ir.Value) -> Mapping[ir.Value, int]:
    """The values of the forward pass that the scores read beside a layer, and the axis of the images in each.

    What is not of images, such as their number or a mask of constants, is computed behind the layer again.
    """
    moving = {layer}
    for node in model.graph:
        if not moving.isdisjoint(node.inputs):
            moving.update(node.outputs)
    kept: dict[ir.Value, int] = {}
    waiting, seen = [*scores], {layer}
    while waiting:
        value = waiting.pop()
        if value in seen or value.const_value is not None:
            continue
        seen.add(value)
        producer = value.producer()
        axis = None if value in moving else _axis_of_images(known.shapes.get(value, ()))
        if axis is not None or producer is None:
            kept[value] = axis or 0
        else:
            waiting += [read for read in producer.inputs if read is not None]
    return kept


def _axis_of_images(shape: Shape) -> int | None:
    """The one axis of a shape that follows the number of images."""
    axes = [axis for axis, length in enumerate(shape) if length < 0]
    return axes[0] if len(axes) == 1 else None


def _like(value: ir.Value, name: str, known: Known, dtype: ir.DataType | None = None) -> ir.Value:
    shape = ir.Shape(["n" if length == BATCH else None if length < 0 else length for length in known.shapes[value]])
    return ir.Value(name=name, type=ir.TensorType(dtype or known.dtype), shape=shape)


def _kept(backward: Backward, seeds: Sequence[ir.Value]) -> list[ir.Value]:
    """The values of the forward pass that the backward pass reads."""
    own = {output for node in backward.nodes for output in node.outputs}.union(seeds)
    read = (value for node in backward.nodes for value in node.inputs)
    return list(dict.fromkeys(v for v in read if v is not None and v.const_value is None and v not in own))


def forward_of(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """A copy of a model that returns some of its values."""
    copy = model.clone()
    values = {value.name: value for value in (*copy.graph.inputs, *(v for node in copy.graph for v in node.outputs))}
    # An input is there already, and no graph can return it.
    returned = dict.fromkeys(value for value in outputs if value.producer() is not None)
    copy.graph.outputs[:] = [values[value.name] for value in returned]
    common.RemoveUnusedNodesPass()(copy)
    return copy


def _typed(forward: ir.Model, kept: Sequence[ir.Value], known: Known) -> Mapping[ir.Value, ir.Value]:
    """For each value that is kept, an input of the backward pass."""
    skeleton, _weights = skeleton_of(forward)
    inferred = onnx.shape_inference.infer_shapes(skeleton).graph
    types = {one.name: one.type.tensor_type.elem_type for one in (*inferred.value_info, *inferred.output)}
    types |= {one.name: one.type.tensor_type.elem_type for one in inferred.input}
    return {
        value: ir.Value(
            name=value.name,
            type=ir.TensorType(ir.DataType(types.get(str(value.name), 0) or known.dtype)),
            shape=_like(value, "", known).shape if value in known.shapes else None,
        )
        for value in kept
    }


def _backward(
    backward: Backward,
    gradients: Mapping[ir.Value, ir.Value],
    seeds: Mapping[ir.Value, ir.Value],
    inputs: Mapping[ir.Value, ir.Value],
    known: Known,
) -> ir.Model:
    """A model of the backward pass. Takes its nodes: they read its own inputs and constants from then on."""
    constants: dict[ir.Value, ir.Value] = {value: value for value in backward.initializers}
    for node in backward.nodes:
        for place, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in inputs:
                node.replace_input_with(place, inputs[value])
            elif value.const_value is not None and value not in backward.initializers:
                own = constants.setdefault(value, ir.Value(name=value.name, const_value=value.const_value))
                node.replace_input_with(place, own)
    named = [ir.node("Identity", [gradient]) for gradient in gradients.values()]
    for node, value in zip(named, gradients, strict=True):
        node.outputs[0].name = f"gradient: {value.name}"
        node.outputs[0].type = ir.TensorType(known.dtype)
    graph = ir.Graph(
        inputs=[*seeds.values(), *inputs.values()],
        outputs=[node.outputs[0] for node in named],
        nodes=[*backward.nodes, *named],
        initializers=list(dict.fromkeys(constants.values())),
        opset_imports={"": known.opset},
        name="backward",
    )
    model = ir.Model(graph, ir_version=10)
    common.RemoveUnusedNodesPass()(model)
    return model
