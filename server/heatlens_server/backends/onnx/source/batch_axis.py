"""Following the axis that carries the images through a graph that was made for a fixed number of them.

Every rule says where the images lie in a node's output, and what to do to the node so that it takes any number.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Array, Shape

_TO_THE_END = int(np.iinfo(np.int64).max)


class LosesImages(Exception):
    """No axis of a node's output carries the images, or it is not known which."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the images lie in a value.

    Attributes:
        axis: the one whose length is a multiple of their number, counted from 0.
        before: the product of the axis's factors outside of the images: 1 for windows of images, the number of
            positions for images of positions.
    """

    axis: int
    before: int = 1


@dataclass(frozen=True, slots=True)
class Walk:
    """What is known while a graph is followed.

    Attributes:
        graph: that is followed.
        shapes: of every value, for `count` images.
        count: the number of images that the file is made for.
        number: of images in the new graph, int64 (1,).
        places: of the values that depend on the image.
        edits: what to do to the graph once all of it was followed.
    """

    graph: ir.Graph
    shapes: Mapping[ir.Value, Shape]
    count: int
    number: ir.Value
    places: dict[ir.Value, Place] = field(default_factory=dict)
    edits: list[Callable[[], None]] = field(default_factory=list)


def follow(node: ir.Node, walk: Walk) -> None:
    """Find where the images lie in a node's outputs.

    Raises:
        LosesImages: nowhere.
    """
    carriers = [value for value in node.inputs if value in walk.places]
    if node.op_type in {"Shape", "Size"}:
        # In a file of fixed sizes this is constant, and so is what is computed from it.
        elements, output = _folded(node, walk), node.outputs[0]
        walk.edits.append(
            lambda: output.replace_all_uses_with(_constant_of(f"{output.name}: constant", elements, walk.graph))
        )
    elif carriers:
        place = _RULES.get(node.op_type, _as_first)(node, walk)
        for value in node.outputs:
            lengths = walk.shapes.get(value)
            if lengths is None or (value is not node.outputs[0] and place.axis >= len(lengths)):
                # Nothing reads it, or it is a statistic of the batch: a quantiser's scale.
                continue
            if place.axis >= len(lengths) or lengths[place.axis] % (walk.count * place.before):
                raise LosesImages
            walk.places[value] = place


# What nodes read.


def _given(node: ir.Node, place: int, walk: Walk) -> tuple[ir.Value, Shape]:
    """An input, and its shape.

    Raises:
        LosesImages: it is absent.
    """
    value = node.inputs[place]
    if value is None:
        raise LosesImages
    return value, walk.shapes[value]


def _source(node: ir.Node, walk: Walk) -> tuple[Place, Shape]:
    """Where the images lie in the first input, and its shape.

    Raises:
        LosesImages: it does not depend on them.
    """
    value, shape = _given(node, 0, walk)
    if value not in walk.places:
        raise LosesImages
    return walk.places[value], shape


def _constant(node: ir.Node, at: int) -> list[int]:
    """The integers of an input that is constant.

    Raises:
        LosesImages: it is computed.
    """
    value = node.inputs[at]
    if value is None or value.const_value is None:
        raise LosesImages
    return [int(item) for item in value.const_value.numpy().ravel()]


def _axes(node: ir.Node, rank: int, at: int = 1) -> list[int] | None:
    """The axes that an input names, counted from 0; None if it is absent."""
    if len(node.inputs) <= at or node.inputs[at] is None:
        return None
    return [axis % rank for axis in _constant(node, at)]


# What is written into the graph.


def name_axes(node: ir.Node, axes: Iterable[int], graph: ir.Graph) -> None:
    """Name the axes that a Squeeze removes."""
    node.resize_inputs(2)
    node.replace_input_with(1, _ints(node, graph, "axes", axes))


def _ints(node: ir.Node, graph: ir.Graph, purpose: str, elements: Iterable[int]) -> ir.Value:
    """A new constant vector of int64, for a node."""
    return _constant_of(f"{node.outputs[0].name}: {purpose} for any batch", np.array([*elements], np.int64), graph)


def _constant_of(name: str, array: Array, graph: ir.Graph) -> ir.Value:
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _reshaped(node: ir.Node, at: int, lengths: Sequence[int], graph: ir.Graph) -> ir.Node:
    """A new node that reshapes an input of another one."""
    return ir.node("Reshape", [node.inputs[at], _ints(node, graph, f"shape of input {at}", lengths)], {"allowzero": 0})


def _become_reshape(node: ir.Node, lengths: Sequence[int], graph: ir.Graph) -> None:
    node.op_type = "Reshape"
    node.attributes.clear()
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)
    node.resize_inputs(2)
    node.replace_input_with(1, _ints(node, graph, "shape", lengths))


def _folded(node: ir.Node, walk: Walk) -> Array:
    """What a Shape or Size gives in a file of fixed sizes."""
    _value, shape = _given(node, 0, walk)
    if node.op_type == "Size":
        return np.array(int(np.prod(shape)), np.int64)
    end = node.attributes.get("end")
    last = None if end is None else end.as_int()
    return np.array(shape[node.attributes["start"].as_int() : last], np.int64)


def _repeat(node: ir.Node, at: int, place: Place, walk: Walk) -> None:
    """Repeat an input that is the same for every image, so that each has its own.

    Raises:
        LosesImages: the file has it for several images, each of which may have another.
    """
    _value, shape = _given(node, at, walk)
    axis, graph = place.axis, walk.graph
    if walk.count > 1 or shape[axis] % place.before:
        raise LosesImages
    apart = [*shape[:axis], place.before, 1, shape[axis] // place.before, *shape[axis + 1 :]]
    joined = [-1 if one == axis else length for one, length in enumerate(shape)]

    def insert() -> None:
        opened = _reshaped(node, at, apart, graph)
        ones = _ints(node, graph, f"ones for input {at}", [1] * (len(shape) - axis))
        times = ir.node("Concat", [walk.number, ones], {"axis": 0})
        repeated = ir.node("Expand", [opened.outputs[0], times.outputs[0]])
        lengths = _ints(node, graph, f"shape of repeated input {at}", joined)
        closed = ir.node("Reshape", [repeated.outputs[0], lengths], {"allowzero": 0})
        graph.insert_before(node, [opened, times, repeated, closed])
        node.replace_input_with(at, closed.outputs[0])

    walk.edits.append(insert)


# The rules.


def _as_first(node: ir.Node, walk: Walk) -> Place:
    """Of operators that keep the axis: where the images lie in the first input that depends on them."""
    places = {walk.places[value] for value in node.inputs if value in walk.places}
    if len(places) > 1:
        raise LosesImages
    return places.pop()


def _broadcasting(node: ir.Node, walk: Walk) -> Place:
    """Axes are counted from the end; what is the same for every image is repeated where the images share an axis."""
    rank = len(walk.shapes[node.outputs[0]])
    places = {
        Place(walk.places[value].axis + rank - len(walk.shapes[value]), walk.places[value].before)
        for value in node.inputs
        if value in walk.places
    }
    if len(places) > 1:
        raise LosesImages
    place = places.pop()
    for at, value in enumerate(node.inputs):
        if value is None:
            continue
        axis = place.axis - rank + len(walk.shapes[value])
        length = walk.shapes[value][axis] if axis >= 0 else 1
        if value not in walk.places and length > 1:
            _repeat(node, at, Place(axis, place.before), walk)
        elif value in walk.places and length != walk.shapes[node.outputs[0]][place.axis]:
            raise LosesImages
    return place


def _stacked(node: ir.Node, walk: Walk) -> Place:
    """Of operators whose inputs have an entry for each image: what is the same for all of them is repeated."""
    place = _as_first(node, walk)
    for at, value in enumerate(node.inputs):
        if value is not None and value not in walk.places and len(walk.shapes[value]) > place.axis:
            _repeat(node, at, place, walk)
    return place


def _concat(node: ir.Node, walk: Walk) -> Place:
    place = _stacked(node, walk)
    if node.attributes["axis"].as_int() % len(walk.shapes[node.outputs[0]]) == place.axis:
        raise LosesImages
    return place


def _transpose(node: ir.Node, walk: Walk) -> Place:
    place = _as_first(node, walk)
    order = node.attributes.get("perm")
    rank = len(walk.shapes[node.outputs[0]])
    axes = list(order.as_ints()) if order is not None else list(range(rank))[::-1]
    return Place(axes.index(place.axis), place.before)


def _reshape(node: ir.Node, walk: Walk) -> Place:
    """The images stay as far from the first element, in the order of memory, as they were."""
    (place, source), target = _source(node, walk), walk.shapes[node.outputs[0]]
    outside = int(np.prod(source[: place.axis])) * place.before
    found = _axis_behind(outside, target, place.axis, walk.count)
    lengths = [-1 if axis == found.axis else length for axis, length in enumerate(target)]
    walk.edits.append(lambda: _become_reshape(node, lengths, walk.graph))
    return found


def _axis_behind(outside: int, shape: Shape, axis: int, count: int) -> Place:
    """The axis that holds the images, given the number of elements outside of them.

    Of one image several axes do, where others begin or end: one of its own is taken first.

    Args:
        outside: the product of all lengths, and factors of lengths, before the images.
        shape: of the value.
        axis: the images' before, which is taken if it does.
        count: of images in `shape`.
    """
    places, product = [], 1
    for at, length in enumerate(shape):
        if outside % product == 0 and (product * length) % (outside * count) == 0:
            places.append((Place(at, outside // product), length))
        product *= length
    own = [place for place, length in places if (length, place.before) == (count, 1)]
    same = [place for place in own if place.axis == axis]
    # Where one axis ends and the next one starts: in the next one, but for the last one, which has features.
    starting = [place for place, _length in places if place.before == 1 and place.axis < len(shape) - 1]
    ending = [place for place, _length in places if place.before > 1]
    for ranked in (same, own, starting, ending, [place for place, _length in places]):
        if ranked:
            return ranked[0]
    raise LosesImages


def _squeeze(node: ir.Node, walk: Walk) -> Place:
    place, source = _source(node, walk)
    axes = _axes(node, len(source))
    if axes is None:
        axes = [axis for axis, length in enumerate(source) if length == 1]
        walk.edits.append(lambda: name_axes(node, axes, walk.graph))
    if place.axis in axes:
        raise LosesImages
    return Place(place.axis - sum(axis < place.axis for axis in axes), place.before)


def _unsqueeze(node: ir.Node, walk: Walk) -> Place:
    place, rank = _as_first(node, walk), len(walk.shapes[node.outputs[0]])
    axes = _axes(node, rank) or []
    return Place([axis for axis in range(rank) if axis not in axes][place.axis], place.before)


def _reduction(node: ir.Node, walk: Walk) -> Place:
    place, source = _source(node, walk)
    if "axis" in node.attributes:
        axes = [node.attributes["axis"].as_int() % len(source)]
    elif (found := _axes(node, len(source))) is not None:
        axes = found
    else:
        axes = [] if node.attributes["noop_with_empty_axes"].as_int() else list(range(len(source)))
    if place.axis in axes:
        raise LosesImages
    if node.attributes["keepdims"].as_int():
        return place
    return Place(place.axis - sum(axis < place.axis for axis in axes), place.before)


def _gather(node: ir.Node, walk: Walk) -> Place:
    """Of constant places, the same ones of every image."""
    (place, source), (index, chosen) = _source(node, walk), _given(node, 1, walk)
    axis = node.attributes["axis"].as_int() % len(source)
    if index in walk.places:
        raise LosesImages
    if axis != place.axis:
        return Place(place.axis + (len(chosen) - 1 if axis < place.axis else 0), place.before)
    # Of all places of the one image, as PyTorch writes as_strided: along an axis behind the images.
    if walk.count > 1 or place.before > 1 or chosen[:1] != (1,):
        raise LosesImages

    def part_images() -> None:
        parts = _reshaped(node, 0, [*source[:axis], -1, *source[axis:]], walk.graph)
        of_one = _reshaped(node, 1, chosen[1:], walk.graph)
        walk.graph.insert_before(node, [parts, of_one])
        node.replace_input_with(0, parts.outputs[0])
        node.replace_input_with(1, of_one.outputs[0])
        node.attributes["axis"] = ir.AttrInt64("axis", axis + 1)

    walk.edits.append(part_images)
    return place


def _slice(node: ir.Node, walk: Walk) -> Place:
    """Along other axes, or of all images: that end is left open."""
    place, source = _source(node, walk)
    axes = _axes(node, len(source), at=3) or list(range(len(source)))
    if place.axis in axes[: _given(node, 1, walk)[1][0]]:
        if walk.shapes[node.outputs[0]][place.axis] != source[place.axis]:
            raise LosesImages
        ends = _constant(node, 2)
        ends[axes.index(place.axis)] = _TO_THE_END
        walk.edits.append(lambda: node.replace_input_with(2, _ints(node, walk.graph, "ends", ends)))
    return place


def _expand(node: ir.Node, walk: Walk) -> Place:
    (place, source), target = _source(node, walk), walk.shapes[node.outputs[0]]
    axis = place.axis + len(target) - len(source)
    if target[axis] != source[place.axis]:
        raise LosesImages
    # One place expands to as many as there are.
    lengths = [1 if at == axis else length for at, length in enumerate(target)]
    walk.edits.append(lambda: node.replace_input_with(1, _ints(node, walk.graph, "shape", lengths)))
    return Place(axis, place.before)


def _resize(node: ir.Node, walk: Walk) -> Place:
    """Sizes are given for the other axes alone."""
    (place, _shape), target = _source(node, walk), walk.shapes[node.outputs[0]]
    if len(node.inputs) > 3 and node.inputs[3] is not None and "axes" not in node.attributes:
        axes = [axis for axis in range(len(target)) if axis != place.axis]

        def leave_out_batch() -> None:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
            node.replace_input_with(3, _ints(node, walk.graph, "sizes", [target[axis] for axis in axes]))

        walk.edits.append(leave_out_batch)
    return place


def _mat_mul(node: ir.Node, walk: Walk) -> Place:
    """Images are matrices, or rows of the left operand, or columns of the right one."""
    shapes = [_given(node, at, walk)[1] for at in (0, 1)]
    left, right = (
        len(shape) - walk.places[value].axis if value in walk.places else 0
        for value, shape in zip(node.inputs, shapes, strict=True)
    )
    if min(map(len, shapes)) < 2 or left == 1 or right == 2 or (left, right) == (2, 1):
        raise LosesImages
    if max(left, right) > 2:
        return _broadcasting(node, walk)
    return Place(len(walk.shapes[node.outputs[0]]) - max(left, right), _as_first(node, walk).before)


def _gemm(node: ir.Node, walk: Walk) -> Place:
    place, _shape = _source(node, walk)
    if node.inputs[1] in walk.places or place.axis != node.attributes["transA"].as_int():
        raise LosesImages
    return Place(0, place.before)


def _einsum(node: ir.Node, walk: Walk) -> Place:
    """The letter of the images is the same in all operands that have them, and in the result."""
    terms, _arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    pairs = [
        (term[walk.places[value].axis], walk.places[value].before)
        for term, value in zip(terms.split(","), node.inputs, strict=True)
        if value in walk.places and "." not in term
    ]
    if len(set(pairs)) != 1 or pairs[0][0] not in result:
        raise LosesImages
    return Place(result.index(pairs[0][0]), pairs[0][1])


_BROADCASTING = (
    *("Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod"),
    *("Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor"),
)
_REDUCTIONS = (
    *("ArgMax", "ArgMin", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean"),
    *("ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
_RULES: Mapping[str, Callable[[ir.Node, Walk], Place]] = {
    **dict.fromkeys(_BROADCASTING, _broadcasting),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(("GatherElements", "GridSample", "ScatterElements"), _stacked),
    "Concat": _concat,
    "Einsum": _einsum,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _mat_mul,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""Of operators that move axes or name lengths. All others keep the axes of their inputs."""
