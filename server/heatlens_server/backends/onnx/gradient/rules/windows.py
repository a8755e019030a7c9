"""Rules of operators that move a window over an image or resize it: convolutions, pooling, resizing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from heatlens_server.backends.onnx.gradient.rules.layout import along, put
from heatlens_server.backends.onnx.gradient.tape import (
    Array,
    Gradients,
    NotDifferentiable,
    Rule,
    Shape,
    Tape,
    by_first,
    input_of,
    only,
)

# Convolutions.


@dataclass(frozen=True, slots=True)
class Window:
    """How a window moves over the spatial axes, with every default filled in.

    Attributes:
        kernel: its size.
        strides: its steps.
        dilations: the distance of its taps.
        before: what the input is padded by at the start of each axis.
        after: the same at the end.
    """

    kernel: Sequence[int]
    strides: Sequence[int]
    dilations: Sequence[int]
    before: Sequence[int]
    after: Sequence[int]


def _ints(node: ir.Node, name: str, default: Sequence[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return list(default) if attribute is None else list(attribute.as_ints())


def read_window(node: ir.Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """Read a convolution's or a pooling's window.

    Args:
        node: the operator.
        kernel: the window's size.
        sizes: of the input's spatial axes.
    """
    ones = [1] * len(kernel)
    strides, dilations = _ints(node, "strides", ones), _ints(node, "dilations", ones)
    pads = _ints(node, "pads", [0] * (2 * len(kernel)))
    before, after = pads[: len(kernel)], pads[len(kernel) :]
    automatic = node.attributes["auto_pad"].as_string() if "auto_pad" in node.attributes else "NOTSET"
    if automatic == "VALID":
        before, after = [0] * len(kernel), [0] * len(kernel)
    elif automatic in {"SAME_UPPER", "SAME_LOWER"}:
        reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        totals = [
            max(0, (-(-size // stride) - 1) * stride + one - size)
            for size, stride, one in zip(sizes, strides, reach, strict=True)
        ]
        halves = [total // 2 for total in totals]
        rest = [total - half for total, half in zip(totals, halves, strict=True)]
        before, after = (halves, rest) if automatic == "SAME_UPPER" else (rest, halves)
    return Window(kernel, strides, dilations, before, after)


def _conv(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    return by_first(node, conv_gradient(node, only(gradients), input_of(node, 1), tape), tape)


def conv_gradient(node: ir.Node, gradient: ir.Value, weights: ir.Value, tape: Tape) -> ir.Value:
    """The transposed convolution, as a convolution where that is possible: onnxruntime has faster kernels for it.

    Args:
        node: the convolution.
        gradient: of its output.
        weights: its second input, or, if that is of integers, the numbers that they stand for.
        tape: to write on.
    """
    x, shape = input_of(node, 0), tape.shape(input_of(node, 1))
    sizes, kernel = tape.shape(x)[2:], shape[2:]
    if min(*sizes, *kernel) < 0:
        raise NotDifferentiable("Conv of images of unknown size")
    window, group = read_window(node, kernel, sizes), node.attributes["group"].as_int()
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, window.dilations, strict=True)]
    pads = [one - 1 - before for one, before in zip(reach, window.before, strict=True)]
    if min(pads) < 0 or (group == 1 and max(window.strides) > 1 and max(kernel) > 1):
        return _conv_transpose_of(node, gradient, weights, window, tape)
    turned = _turned(weights, shape, group, tape)
    spread = list(tape.shape(node.outputs[0])[2:])
    if max(kernel) == 1 and not any((*window.before, *window.after)):
        # Of one tap: convolve the few places, then put zeros between them.
        found = tape.op("Conv", gradient, turned, group=group)
        return _between(found, x, window.strides, tape)
    for axis, (count, stride) in enumerate(zip(spread, window.strides, strict=True)):
        if stride > 1:
            spread[axis] = (count - 1) * stride + 1
    apart = _between(gradient, None, window.strides, tape, shape=(*tape.shape(node.outputs[0])[:2], *spread))
    ends = [
        size - 1 + one - 1 - (length - 1) - pad
        for size, one, length, pad in zip(sizes, reach, spread, pads, strict=True)
    ]
    if min(ends) < 0:
        return _conv_transpose_of(node, gradient, weights, window, tape)
    return tape.op("Conv", apart, turned, pads=[*pads, *ends], dilations=list(window.dilations), group=group)


def _turned(weights: ir.Value, shape: Shape, group: int, tape: Tape) -> ir.Value:
    """Weights (M, C / group, ...) as those of the reverse convolution: (C, M / group, ...), each kernel turned round.

    In the graph, so that the file does not hold them twice: onnxruntime folds it when it loads the file.
    """
    out_channels, in_channels, *kernel = shape
    axes, rank = list(range(2, 2 + len(kernel))), len(kernel)
    if max(kernel) > 1:
        least, back = [np.iinfo(np.int64).min + 1] * rank, [-1] * rank
        weights = tape.op(
            "Slice", weights, tape.ints(*[-1] * rank), tape.ints(*least), tape.ints(*axes), tape.ints(*back)
        )
    if group == 1:
        return tape.op("Transpose", weights, perm=[1, 0, *axes])
    if in_channels == out_channels // group == 1:
        return weights
    parts = tape.op("Reshape", weights, tape.ints(group, out_channels // group, in_channels, *kernel))
    swapped = tape.op("Transpose", parts, perm=[0, 2, 1, *(axis + 1 for axis in axes)])
    return tape.op("Reshape", swapped, tape.ints(group * in_channels, out_channels // group, *kernel))


def _between(
    values: ir.Value, like: ir.Value | None, strides: Sequence[int], tape: Tape, *, shape: Shape | None = None
) -> ir.Value:
    """Put zeros between the elements of the spatial axes, so that they lie `strides` apart.

    Args:
        values: to put apart.
        like: of the shape wanted, a value of the forward pass; None if `shape` says it.
        strides: one per spatial axis.
        tape: to write on.
        shape: wanted.
    """
    wanted = tape.shape(like) if like is not None else shape or ()
    for axis, stride in enumerate(strides):
        length = wanted[axis + 2]
        count = -(-length // stride)
        values = put(values, axis + 2, np.arange(count, dtype=np.int64) * stride, wanted, tape)
    return values


def _conv_transpose_of(node: ir.Node, gradient: ir.Value, weights: ir.Value, window: Window, tape: Tape) -> ir.Value:
    sizes = tape.shape(input_of(node))[2:]
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(window.kernel, window.dilations, strict=True)]
    counts = [
        (size + before + after - one) // stride + 1
        for size, before, after, one, stride in zip(
            sizes, window.before, window.after, reach, window.strides, strict=True
        )
    ]
    # What the last step of the window did not reach.
    rest = [
        size + before + after - one - (count - 1) * stride
        for size, before, after, one, count, stride in zip(
            sizes, window.before, window.after, reach, counts, window.strides, strict=True
        )
    ]
    return tape.op(
        "ConvTranspose",
        gradient,
        weights,
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.before, *window.after],
        output_padding=rest,
        group=node.attributes["group"].as_int(),
    )


def _conv_transpose(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """A convolution by the same weights."""
    gradient, x, weights = only(gradients), input_of(node, 0), input_of(node, 1)
    kernel, sizes = tape.shape(weights)[2:], tape.shape(x)[2:]
    window = cropped_window(node, kernel, sizes, tape.shape(node.outputs[0])[2:])
    found = tape.op(
        "Conv",
        gradient,
        weights,
        strides=list(window.strides),
        dilations=list(window.dilations),
        pads=[*window.before, *window.after],
        group=node.attributes["group"].as_int(),
    )
    output = tape.shape(node.outputs[0])[2:]
    for axis, size in enumerate(sizes):
        one = (kernel[axis] - 1) * window.dilations[axis] + 1
        got = (output[axis] + window.before[axis] + window.after[axis] - one) // window.strides[axis] + 1
        if got > size:
            # Padding of the output that is a whole step wide: no element reaches there.
            found = tape.op("Slice", found, tape.ints(0), tape.ints(size), tape.ints(axis + 2))
    return by_first(node, found, tape)


def cropped_window(node: ir.Node, kernel: Sequence[int], sizes: Sequence[int], output: Sequence[int]) -> Window:
    """The window of a transposed convolution, whose pads follow from the output's size where that is given."""
    window = read_window(node, kernel, sizes)
    automatic = node.attributes["auto_pad"].as_string()
    if "output_shape" not in node.attributes and automatic in {"NOTSET", "VALID"}:
        return window
    rest = _ints(node, "output_padding", [0] * len(kernel))
    steps = zip(sizes, output, kernel, window.strides, window.dilations, rest, strict=True)
    totals = [
        max(0, stride * (size - 1) + more + (one - 1) * dilation + 1 - wanted)
        for size, wanted, one, stride, dilation, more in steps
    ]
    halves = [total // 2 for total in totals]
    others = [total - half for total, half in zip(totals, halves, strict=True)]
    before, after = (halves, others) if automatic == "SAME_UPPER" else (others, halves)
    return Window(kernel, window.strides, window.dilations, before, after)


# Pooling and resizing, which are linear along each axis or choose one element per window.


def _max_pool(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Each window's gradient goes to its maximum, the first of several, as in PyTorch."""
    gradient, x = only(gradients), input_of(node, 0)
    if "storage_order" in node.attributes and node.attributes["storage_order"].as_int():
        raise NotDifferentiable("MaxPool with storage_order")
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    _values, indices = tape.ops("MaxPool", [x], 2, **attributes)
    # The indices count over the whole tensor, images and channels included.
    zeros = tape.op("Reshape", tape.zeros_like(x), tape.ints(-1))
    flat = tape.op("Reshape", indices, tape.ints(-1))
    added = tape.scatter_add("ScatterElements", zeros, flat, tape.op("Reshape", gradient, tape.ints(-1)), axis=0)
    return [tape.reshape(added, x)]


def _average_pool(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x = input_of(node, 0)
    return [_separable(node, only(gradients), tape.shape(x), tape.shape(node.outputs[0]), tape)]


def _resize(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x = input_of(node, 0)
    if node.attributes["coordinate_transformation_mode"].as_string() == "tf_crop_and_resize":
        raise NotDifferentiable("Resize with tf_crop_and_resize")
    found = _separable(node, only(gradients), tape.shape(x), tape.shape(node.outputs[0]), tape)
    return [found, *[None] * (len(node.inputs) - 1)]


def _separable(node: ir.Node, gradient: ir.Value, source: Shape, output: Shape, tape: Tape) -> ir.Value:
    """The gradient of an operator that is a matrix along each axis: by the transposed matrices.

    The matrices are found by running the operator on unit vectors, so no form of it needs a case of its own.
    """
    for axis, (length, count) in enumerate(zip(source, output, strict=True)):
        if length < 0 or count < 0:
            continue
        if axis < 2 or node.op_type == "AveragePool" or length != count:
            matrix = np.eye(length) if axis < 2 else _matrix(node, axis, source, output, tape)
            if matrix.shape != (length, count):
                raise NotDifferentiable(f"{node.op_type} of axis {axis}")
            if not np.array_equal(matrix, np.eye(length)):
                gradient = along(gradient, axis, matrix.T, len(source), tape)
    return gradient


def _matrix(node: ir.Node, axis: int, source: Shape, output: Shape, tape: Tape) -> Array:
    """What an operator does along one spatial axis, as a matrix (in, out)."""
    length = source[axis]
    units = np.zeros((length, 1, *source[2:]), np.float64)
    # The same along the other axes, along which the weights of one output sum to one.
    for place in range(length):
        units[(place, 0, *(place if one == axis else slice(None) for one in range(2, len(source))))] = 1.0
    sizes = np.array([length, 1, *output[2:]], np.int64)
    if node.op_type == "Resize":
        found = _resized(node, units, sizes, source, tape)
    else:
        (found,) = _run(node, [units], tape.known.opset)
    return found[
        (slice(None), 0, *(slice(None) if one == axis else found.shape[one] // 2 for one in range(2, found.ndim)))
    ]


def _resized(node: ir.Node, units: Array, sizes: Array, source: Shape, tape: Tape) -> Array:
    nothing = np.empty(0, np.float32)
    feeds = [units, nothing]
    scales = tape.array(node.inputs[2]) if len(node.inputs) > 2 else None
    if scales is not None and scales.size:
        # Scales are not the quotients of sizes where these were rounded.
        every = np.ones(len(source), np.float32)
        every[[axis % len(source) for axis in _ints(node, "axes", range(len(source)))]] = scales
        every[:2] = 1
        feeds.append(every)
    else:
        feeds += [nothing, sizes]
    (found,) = _run(node, feeds, tape.known.opset, without=("axes",))
    return found


def _run(node: ir.Node, inputs: Sequence[Array], opset: int, *, without: Sequence[str] = ()) -> list[Array]:
    """Run an operator on arrays, by onnx's reference implementation; empty ones are absent."""
    reference = reference_of(node, [array.size > 0 for array in inputs], opset, without=without)
    found = reference.run(None, {f"x{place}": array for place, array in enumerate(inputs) if array.size})
    return [np.asarray(array) for array in found]


def reference_of(
    node: ir.Node, present: Sequence[bool], opset: int, *, without: Sequence[str] = ()
) -> ReferenceEvaluator:
    """The reference implementation of an operator, of the package onnx.

    Args:
        node: the operator.
        present: whether each input is there: x0, x1, and so on.
        opset: the version of ONNX's operators.
        without: attributes to leave out.
    """
    names = [f"x{place}" if is_there else "" for place, is_there in enumerate(present)]
    outputs = [f"y{place}" for place in range(len(node.outputs))]
    proto = onnx.helper.make_node(node.op_type, names, outputs)
    proto.attribute.extend(ir.to_proto(attribute) for name, attribute in node.attributes.items() if name not in without)
    inputs, results = ([onnx.ValueInfoProto(name=name) for name in given if name] for given in (names, outputs))
    return ReferenceEvaluator(onnx.helper.make_graph([proto], "one", inputs, results), opsets={"": opset})


def _global_average_pool(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x = input_of(node, 0)
    count = float(np.prod(tape.shape(x)[2:]))
    return [tape.expand(tape.op("Div", only(gradients), tape.number(count)), x)]


def _global_max_pool(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """The largest elements share the gradient."""
    x = input_of(node, 0)
    mask = tape.cast(tape.op("Equal", x, node.outputs[0]))
    share = tape.op("Div", mask, tape.sum(mask, range(2, tape.rank(x)), keepdims=True))
    return [tape.op("Mul", share, only(gradients))]


RULES: Mapping[str, Rule] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GlobalAveragePool": _global_average_pool,
    "GlobalMaxPool": _global_max_pool,
    "MaxPool": _max_pool,
    "Resize": _resize,
}
"""By operator."""
