"""Rules of operators that move elements, and of those that sum or choose among them."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import (
    Array,
    Gradients,
    NotDifferentiable,
    Rule,
    Shape,
    Tape,
    input_of,
    only,
)


def _only_first(node: ir.Node, gradient: ir.Value) -> Gradients:
    return [gradient, *[None] * (len(node.inputs) - 1)]


def _reshape(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    return _only_first(node, tape.reshape(only(gradients), input_of(node)))


def _transpose(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    rank = tape.rank(input_of(node))
    given = node.attributes.get("perm")
    order = list(given.as_ints()) if given is not None else list(range(rank))[::-1]
    return [tape.op("Transpose", only(gradients), perm=[order.index(axis) for axis in range(rank)])]


def _expand(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    source = tape.shape(node.outputs[0])
    return _only_first(node, tape.unbroadcast(only(gradients), source, input_of(node)))


def _tile(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    repeats, shape = tape.integers(node.inputs[1]), tape.shape(input_of(node))
    split = [length for pair in zip(repeats, shape, strict=True) for length in pair]
    if (target := tape.target(split)) is None:
        raise NotDifferentiable("Tile of images")
    parts = tape.op("Reshape", only(gradients), target)
    return _only_first(node, tape.sum(parts, range(0, len(split), 2), keepdims=False))


def _concat(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    gradient = only(gradients)
    first, found = 0, []
    axis = node.attributes["axis"].as_int()
    for value in node.inputs:
        if value is None:
            raise NotDifferentiable("Concat of an absent input")
        length = tape.shape(value)[axis]
        if length < 0:
            raise NotDifferentiable("Concat of images")
        part = tape.op("Slice", gradient, tape.ints(first), tape.ints(first + length), tape.ints(axis))
        found.append(part if tape.wanted(value) else None)
        first += length
    return found


def _split(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    parts = [
        tape.zeros_like(output) if gradient is None else gradient
        for output, gradient in zip(node.outputs, gradients, strict=True)
    ]
    return _only_first(node, tape.op("Concat", *parts, axis=node.attributes["axis"].as_int()))


def put(gradient: ir.Value, axis: int, index: Array, shape: Shape, tape: Tape) -> ir.Value:
    """The inverse of a selection: what was taken from `index` of an axis goes back there, zero goes everywhere else.

    Args:
        gradient: of what was taken, in which `axis` is as long as `index`.
        axis: counted from 0.
        index: int64 (n,), in [0, shape[axis]); elements that were taken several times are summed.
        shape: before the selection.
        tape: to write on.
    """
    length = shape[axis]
    if np.array_equal(index, np.arange(length)):
        return gradient
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        before, after = int(index[0]), length - int(index[0]) - len(index)
        return tape.op("Pad", gradient, tape.ints(before, after), tape.number(0.0), tape.ints(axis))
    if len(np.unique(index)) == len(index):
        # A row of zeros behind the gradient, from which every place that was not taken is filled.
        source = np.full(length, len(index), np.int64)
        source[index] = np.arange(len(index))
        padded = tape.op("Pad", gradient, tape.ints(0, 1), tape.number(0.0), tape.ints(axis))
        return tape.op("Gather", padded, tape.constant(source), axis=axis)
    return along(gradient, axis, selection(index, length), len(shape), tape)


def selection(index: Array, length: int) -> Array:
    """The matrix (n, length) that takes the elements `index`, (n,), of a vector."""
    matrix = np.zeros((len(index), length))
    matrix[np.arange(len(index)), index] = 1
    return matrix


def along(values: ir.Value, axis: int, matrix: Array, rank: int, tape: Tape) -> ir.Value:
    """Multiply an axis by a constant matrix (n, m): from length n to m.

    Args:
        values: of a shape in which the axis is n long.
        axis: counted from 0.
        matrix: (n, m).
        rank: of `values`.
        tape: to write on.
    """
    dtype = tape.known.dtype.numpy()
    if axis == rank - 2:
        return tape.op("MatMul", tape.constant(matrix.T, dtype), values)
    factor = tape.constant(matrix, dtype)
    if axis == rank - 1:
        return tape.op("MatMul", values, factor)
    order = [place for place in range(rank) if place != axis] + [axis]
    last = tape.op("MatMul", tape.op("Transpose", values, perm=order), factor)
    return tape.op("Transpose", last, perm=[order.index(place) for place in range(rank)])


def _slice(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    shape, gradient = tape.shape(input_of(node)), only(gradients)
    starts, ends = tape.integers(node.inputs[1]), tape.integers(node.inputs[2])
    optional = [*node.inputs[3:], None, None]
    axes = tape.integers(optional[0]) if optional[0] is not None else list(range(len(starts)))
    steps = tape.integers(optional[1]) if optional[1] is not None else [1] * len(starts)
    for start, end, given, step in zip(starts, ends, axes, steps, strict=True):
        axis = given % len(shape)
        length = shape[axis]
        if length < 0:
            if (start, step) == (0, 1) and end >= np.iinfo(np.int32).max:
                continue
            raise NotDifferentiable("Slice of images")
        # Beyond the ends, ONNX clamps as Python does, but for an end below -length of a negative step.
        stop = None if step < 0 and end < -length else end
        gradient = put(gradient, axis, np.arange(length, dtype=np.int64)[start:stop:step], shape, tape)
    return _only_first(node, gradient)


def _gather(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    shape, index = tape.shape(input_of(node)), tape.array(node.inputs[1])
    axis = node.attributes["axis"].as_int() % len(shape)
    gradient, count = only(gradients), int(np.prod(tape.shape(input_of(node, 1))))
    if tape.rank(input_of(node, 1)) != 1:
        target = tape.target([*shape[:axis], count, *shape[axis + 1 :]])
        if target is None:
            raise NotDifferentiable("Gather of images")
        gradient = tape.op("Reshape", gradient, target)
    if index is None or shape[axis] < 0:
        return _only_first(node, _put_computed(gradient, axis, input_of(node, 1), input_of(node), tape))
    places = index.ravel().astype(np.int64) % shape[axis]
    return _only_first(node, put(gradient, axis, places, shape, tape))


def _put_computed(gradient: ir.Value, axis: int, index: ir.Value, like: ir.Value, tape: Tape) -> ir.Value:
    """As `put`, for indices that are computed: any integers, which count from the end if they are negative."""
    lengths = [-1 if place == axis else 1 for place in range(tape.rank(like))]
    every = tape.op("Expand", tape.op("Reshape", index, tape.ints(*lengths)), tape.op("Shape", gradient))
    return tape.scatter_add("ScatterElements", tape.zeros_like(like), every, gradient, axis=axis)


def _compress(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x, gradient = input_of(node), only(gradients)
    taken = tape.op("NonZero", input_of(node, 1))
    if "axis" in node.attributes:
        axis = node.attributes["axis"].as_int() % tape.rank(x)
        return _only_first(node, _put_computed(gradient, axis, taken, x, tape))
    flat = tape.op("Reshape", tape.zeros_like(x), tape.ints(-1))
    places = tape.op("Reshape", taken, tape.ints(-1))
    return _only_first(node, tape.reshape(tape.op("ScatterElements", flat, places, gradient, axis=0), x))


def _trilu(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    diagonal = node.inputs[1] if len(node.inputs) > 1 else None
    upper = node.attributes["upper"].as_int()
    return _only_first(node, tape.op("Trilu", only(gradients), diagonal, upper=upper))


def _gather_elements(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    zeros, axis = tape.zeros_like(input_of(node)), node.attributes["axis"].as_int()
    added = tape.scatter_add("ScatterElements", zeros, node.inputs[1], only(gradients), axis=axis)
    return _only_first(node, added)


def _gather_nd(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x, index = input_of(node), input_of(node, 1)
    zeros, rank = tape.zeros_like(x), tape.rank(index)
    places = index
    for axis in reversed(range(node.attributes["batch_dims"].as_int())):
        # ScatterND has no batch_dims: the number of the stack becomes an index in front of the others.
        length = tape.op("Squeeze", tape.op("Shape", index, start=axis, end=axis + 1))
        numbers = tape.op("Range", tape.constant(0, np.int64), length, tape.constant(1, np.int64))
        column = tape.op("Reshape", numbers, tape.ints(*(-1 if place == axis else 1 for place in range(rank))))
        size = tape.op("Concat", tape.op("Shape", index, end=rank - 1), tape.ints(1), axis=0)
        places = tape.op("Concat", tape.op("Expand", column, size), places, axis=rank - 1)
    return _only_first(node, tape.scatter_add("ScatterND", zeros, places, only(gradients)))


def _reduction(node: ir.Node) -> str:
    reduction = node.attributes["reduction"].as_string()
    if reduction not in {"none", "add"}:
        raise NotDifferentiable(f"{node.op_type} with reduction {reduction!r}")
    return reduction


def _scatter_elements(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    gradient, axis = only(gradients), node.attributes["axis"].as_int()
    _data, index, updates = node.inputs
    if updates is None:
        raise NotDifferentiable("ScatterElements without updates")
    kept = gradient
    if _reduction(node) == "none":
        kept = tape.op("ScatterElements", gradient, index, tape.zeros_like(updates), axis=axis)
    taken = tape.op("GatherElements", gradient, index, axis=axis) if tape.wanted(updates) else None
    return [kept, None, taken]


def _scatter_nd(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    gradient = only(gradients)
    _data, index, updates = node.inputs
    if updates is None:
        raise NotDifferentiable("ScatterND without updates")
    kept = gradient
    if _reduction(node) == "none":
        kept = tape.op("ScatterND", gradient, index, tape.zeros_like(updates))
    return [kept, None, tape.op("GatherND", gradient, index) if tape.wanted(updates) else None]


def _pad(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    shape, gradient = tape.shape(input_of(node)), only(gradients)
    pads, mode = tape.integers(node.inputs[1]), node.attributes["mode"].as_string()
    given = node.inputs[3] if len(node.inputs) > 3 else None
    axes = tape.integers(given) if given is not None else list(range(len(shape)))
    for place, given_axis in enumerate(axes):
        axis, before, after = given_axis % len(shape), pads[place], pads[place + len(axes)]
        if not (before or after):
            continue
        length = shape[axis]
        if length < 0:
            raise NotDifferentiable("Pad of images")
        if mode == "constant":
            gradient = _unpad(gradient, axis, (before, after), length, tape)
        else:
            # Which element each place of the padded axis shows; the modes are numpy's.
            shown = np.pad(np.arange(length), (before, after), mode=mode)  # type: ignore[call-overload]
            gradient = along(gradient, axis, selection(shown, length), len(shape), tape)
    return _only_first(node, gradient)


def _unpad(gradient: ir.Value, axis: int, pads: tuple[int, int], length: int, tape: Tape) -> ir.Value:
    """Undo a constant pad of one axis, whose ends may be negative: those cut elements off."""
    before, after = pads
    first, last = max(before, 0), max(before, 0) + length - max(-before, 0) - max(-after, 0)
    cut = tape.op("Slice", gradient, tape.ints(first), tape.ints(last), tape.ints(axis))
    if before >= 0 and after >= 0:
        return cut
    ends = tape.ints(max(-before, 0), max(-after, 0))
    return tape.op("Pad", cut, ends, tape.number(0.0), tape.ints(axis))


def _depth_to_space(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    _n, channels, height, width = tape.shape(input_of(node))
    block, gradient = node.attributes["blocksize"].as_int(), only(gradients)
    if node.attributes["mode"].as_string() == "DCR":
        return [tape.op("SpaceToDepth", gradient, blocksize=block)]
    kept = channels // block**2
    parts = tape.op("Reshape", gradient, tape.ints(-1, kept, height, block, width, block))
    return [tape.reshape(tape.op("Transpose", parts, perm=[0, 1, 3, 5, 2, 4]), input_of(node))]


def _space_to_depth(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    block = node.attributes["blocksize"].as_int()
    return [tape.op("DepthToSpace", only(gradients), blocksize=block, mode="DCR")]


def _pass_on(node: ir.Node, gradients: Gradients, _tape: Tape) -> Gradients:
    return _only_first(node, only(gradients))


def _cum_sum(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    exclusive, reverse = node.attributes["exclusive"].as_int(), node.attributes["reverse"].as_int()
    summed = tape.op("CumSum", only(gradients), node.inputs[1], exclusive=exclusive, reverse=1 - reverse)
    return [summed, None]


def _top_k(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    values = gradients[0]
    if values is None:
        return [None, None]
    axis = node.attributes["axis"].as_int()
    zeros = tape.zeros_like(input_of(node))
    return [tape.op("ScatterElements", zeros, node.outputs[1], values, axis=axis), None]


# Sums.


def _axes(node: ir.Node, tape: Tape) -> list[int]:
    """The axes of a reduction, counted from 0."""
    rank = tape.rank(input_of(node))
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = tape.integers(given) if given is not None else []
    if not axes:
        axes = [] if node.attributes["noop_with_empty_axes"].as_int() else list(range(rank))
    return sorted(axis % rank for axis in axes)


def _kept(value: ir.Value, axes: Sequence[int], node: ir.Node, tape: Tape) -> ir.Value:
    """A value of a reduction's output shape, with the reduced axes at length 1."""
    if node.attributes["keepdims"].as_int() or not axes:
        return value
    return tape.op("Unsqueeze", value, tape.ints(*axes))


def _spread(node: ir.Node, gradient: ir.Value, tape: Tape) -> ir.Value:
    """The gradient of a sum: repeated over what was summed."""
    x, axes = input_of(node), _axes(node, tape)
    kept = _kept(gradient, axes, node, tape)
    if any(tape.shape(x)[axis] < 0 for axis in axes):
        return tape.op("Expand", kept, tape.op("Shape", x))
    return tape.expand(kept, x)


def _reduce_sum(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    return _only_first(node, _spread(node, only(gradients), tape))


def _reduce_mean(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    shape = tape.shape(input_of(node))
    counted = [shape[axis] for axis in _axes(node, tape)]
    if min(counted, default=1) < 0:
        raise NotDifferentiable("ReduceMean over images")
    share = tape.op("Div", only(gradients), tape.number(float(np.prod(counted))))
    return _only_first(node, _spread(node, share, tape))


def _reduce_extreme(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """The largest elements share the gradient, as in torch.amax."""
    x, axes = input_of(node), _axes(node, tape)
    mask = tape.cast(tape.op("Equal", x, _kept(node.outputs[0], axes, node, tape)))
    share = tape.op("Div", mask, tape.sum(mask, axes, keepdims=True))
    return _only_first(node, tape.op("Mul", share, _kept(only(gradients), axes, node, tape)))


def _by_slope(node: ir.Node, gradients: Gradients, tape: Tape, slope: ir.Value) -> Gradients:
    kept = _kept(only(gradients), _axes(node, tape), node, tape)
    return _only_first(node, tape.op("Mul", kept, slope))


def _reduce_l1(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    return _by_slope(node, gradients, tape, tape.op("Sign", input_of(node)))


def _reduce_l2(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """X / y; 0 where y is 0."""
    norm = _kept(node.outputs[0], _axes(node, tape), node, tape)
    is_zero = tape.cast(tape.op("Equal", norm, tape.number(0.0)))
    return _by_slope(node, gradients, tape, tape.op("Div", input_of(node), tape.op("Add", norm, is_zero)))


def _reduce_sum_square(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    return _by_slope(node, gradients, tape, tape.op("Mul", input_of(node), tape.number(2.0)))


def _reduce_log_sum(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    share = tape.op("Div", only(gradients), tape.op("Exp", node.outputs[0]))
    return _only_first(node, _spread(node, share, tape))


def _reduce_log_sum_exp(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    kept = _kept(node.outputs[0], _axes(node, tape), node, tape)
    return _by_slope(node, gradients, tape, tape.op("Exp", tape.op("Sub", input_of(node), kept)))


def _reduce_prod(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """The product of the other elements: that of those which are not 0, over x; 0 if another one is 0."""
    x, axes = input_of(node), _axes(node, tape)
    is_zero = tape.cast(tape.op("Equal", x, tape.number(0.0)))
    filled = tape.op("Add", x, is_zero)
    others_zero = tape.op("Sub", tape.sum(is_zero, axes, keepdims=True), is_zero)
    product = tape.op("ReduceProd", filled, tape.ints(*axes), keepdims=1) if axes else filled
    quotient = tape.op("Div", product, filled)
    none_zero = tape.cast(tape.op("Equal", others_zero, tape.number(0.0)))
    return _by_slope(node, gradients, tape, tape.op("Mul", quotient, none_zero))


RULES: Mapping[str, Rule] = {
    "Cast": _pass_on,
    "Compress": _compress,
    "Concat": _concat,
    "CumSum": _cum_sum,
    "DepthToSpace": _depth_to_space,
    "Dropout": _pass_on,
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Identity": _pass_on,
    "Pad": _pad,
    "ReduceL1": _reduce_l1,
    "ReduceL2": _reduce_l2,
    "ReduceLogSum": _reduce_log_sum,
    "ReduceLogSumExp": _reduce_log_sum_exp,
    "ReduceMax": _reduce_extreme,
    "ReduceMean": _reduce_mean,
    "ReduceMin": _reduce_extreme,
    "ReduceProd": _reduce_prod,
    "ReduceSum": _reduce_sum,
    "ReduceSumSquare": _reduce_sum_square,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _reshape,
}
"""By operator."""
