"""Operators on small arrays by numpy: those that graphs compute shapes, indices and masks with."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Array

# Arrays, and None for absent inputs. numpy's functions have narrower types than operators need.
Elements = Any
Inputs = Sequence[Elements]
Attributes = Mapping[str, Any]
Function = Callable[[Inputs, Attributes], Elements]


GROWING = frozenset({"ConstantOfShape", "Expand", "MaxUnpool", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"})
"""Operators whose outputs can be of any size, whatever that of their inputs."""


def can_compute(op_type: str) -> bool:
    """Whether `compute` knows an operator. It takes memory for the operator's inputs and outputs, and not more.

    The outputs of those that are not GROWING have at most as many elements as all inputs have, multiplied.
    """
    return op_type in _FUNCTIONS


def compute(node: ir.Node, inputs: Inputs) -> list[Array]:
    """Run an operator whose attributes have their defaults filled in.

    Args:
        node: the operator.
        inputs: None for absent ones.

    Returns:
        Its outputs, of the graph's element types.

    Raises:
        Exception: the inputs do not fit each other; of whatever class numpy raises.
    """
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    with np.errstate(all="ignore"):
        found = _FUNCTIONS[node.op_type](inputs, attributes)
    outputs = [np.asarray(output) for output in (found if isinstance(found, list) else [found])]
    # numpy sums integers in its own type, and takes powers of mixed types in the larger one.
    kept = inputs[0].dtype if node.op_type in _OF_ONE_TYPE else None
    return [output.astype(kept or output.dtype, copy=False) for output in outputs]


_OF_ONE_TYPE = frozenset({"Clip", "Pow", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"})


def _of(function: Callable[..., Elements]) -> Function:
    """Of inputs that are all there, and no attributes."""
    return lambda inputs, _attributes: function(*inputs)


def _ints(inputs: Inputs, place: int, default: Elements = None) -> Elements:
    """An input's integers as a tuple; the default where it is absent."""
    value = inputs[place] if place < len(inputs) else None
    return default if value is None else tuple(int(item) for item in value.ravel())


def _cast(inputs: Inputs, attributes: Attributes) -> Elements:
    return inputs[0].astype(ir.DataType(attributes["to"]).numpy())


def _clip(inputs: Inputs, _attributes: Attributes) -> Elements:
    low, high = [*inputs[1:], None, None][:2]
    return np.clip(inputs[0], low, high)


def _constant_of_shape(inputs: Inputs, attributes: Attributes) -> Elements:
    filled = attributes["value"].numpy() if "value" in attributes else np.zeros(1, np.float32)
    return np.full(_ints(inputs, 0), filled.ravel()[0], filled.dtype)


def _div(inputs: Inputs, _attributes: Attributes) -> Elements:
    """Integers are divided towards zero."""
    one, other = inputs[0], inputs[1]
    if not np.issubdtype(one.dtype, np.integer):
        return one / other
    quotient = np.abs(one) // np.abs(other)
    return np.sign(one) * np.sign(other) * quotient


def _expand(inputs: Inputs, _attributes: Attributes) -> Elements:
    x = inputs[0]
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, _ints(inputs, 1))).copy()


def _flatten(inputs: Inputs, attributes: Attributes) -> Elements:
    x = inputs[0]
    axis = attributes["axis"] % x.ndim if attributes["axis"] != x.ndim else x.ndim
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _gather_nd(inputs: Inputs, attributes: Attributes) -> Elements:
    if attributes["batch_dims"]:
        raise ValueError("batch_dims")
    return inputs[0][tuple(np.moveaxis(inputs[1], -1, 0))]


def _mod(inputs: Inputs, attributes: Attributes) -> Elements:
    return np.fmod(*inputs) if attributes["fmod"] else np.mod(*inputs)


def _range(inputs: Inputs, _attributes: Attributes) -> Elements:
    start, limit, delta = (value.ravel()[0] for value in inputs)
    count = max(0, math.ceil((limit - start) / delta))
    return start + np.arange(count, dtype=start.dtype) * delta


def _reduce(function: Callable[..., Elements]) -> Function:
    def reduce(inputs: Inputs, attributes: Attributes) -> Elements:
        x, axes = inputs[0], _ints(inputs, 1)
        if not axes and attributes["noop_with_empty_axes"]:
            return x
        return function(x, axis=axes or None, keepdims=bool(attributes["keepdims"]))

    return reduce


def _reshape(inputs: Inputs, attributes: Attributes) -> Elements:
    x, shape = inputs[0], _ints(inputs, 1)
    if not attributes["allowzero"]:
        shape = [x.shape[place] if length == 0 else length for place, length in enumerate(shape)]
    return x.reshape(shape)


def _scatter_nd(inputs: Inputs, attributes: Attributes) -> Elements:
    if attributes["reduction"] != "none":
        raise ValueError("reduction")
    found = inputs[0].copy()
    found[tuple(np.moveaxis(inputs[1], -1, 0))] = inputs[2]
    return found


def _slice(inputs: Inputs, _attributes: Attributes) -> Elements:
    x, starts, ends = inputs[0], _ints(inputs, 1), _ints(inputs, 2)
    axes = _ints(inputs, 3, range(len(starts)))
    steps = _ints(inputs, 4, [1] * len(starts))
    places = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # Python reads an end of -1 or less as counted from the end; ONNX too, but clamps what is before the start.
        stop = None if step < 0 and end < -x.shape[axis] else end
        places[axis] = slice(start, stop, step)
    return x[tuple(places)]


def _split(inputs: Inputs, attributes: Attributes) -> Elements:
    x, axis, lengths = inputs[0], attributes["axis"], _ints(inputs, 1)
    if lengths is None:
        each = -(-x.shape[axis] // attributes["num_outputs"])
        ends = [each * place for place in range(1, attributes["num_outputs"])]
    else:
        ends = list(np.cumsum(lengths)[:-1])
    return list(np.split(x, ends, axis))


def _squeeze(inputs: Inputs, _attributes: Attributes) -> Elements:
    return np.squeeze(inputs[0], _ints(inputs, 1))


def _trilu(inputs: Inputs, attributes: Attributes) -> Elements:
    diagonal = _ints(inputs, 1, (0,))[0]
    return (np.triu if attributes["upper"] else np.tril)(inputs[0], diagonal)


def _unsqueeze(inputs: Inputs, _attributes: Attributes) -> Elements:
    return np.expand_dims(inputs[0], _ints(inputs, 1))


_FUNCTIONS: Mapping[str, Function] = {
    "Abs": _of(np.abs),
    "Add": _of(np.add),
    "And": _of(np.logical_and),
    "Cast": _cast,
    "Ceil": _of(np.ceil),
    "Clip": _clip,
    "Concat": lambda inputs, attributes: np.concatenate(inputs, attributes["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Div": _div,
    "Equal": _of(np.equal),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _of(np.floor),
    "Gather": lambda inputs, attributes: np.take(inputs[0], inputs[1], attributes["axis"]),
    "GatherND": _gather_nd,
    "Greater": _of(np.greater),
    "GreaterOrEqual": _of(np.greater_equal),
    "Identity": _of(np.asarray),
    "Less": _of(np.less),
    "LessOrEqual": _of(np.less_equal),
    "Mod": _mod,
    "Mul": _of(np.multiply),
    "Neg": _of(np.negative),
    "NonZero": lambda inputs, _attributes: np.stack(np.nonzero(np.atleast_1d(inputs[0]))),
    "Not": _of(np.logical_not),
    "Or": _of(np.logical_or),
    "Pow": _of(np.power),
    "Range": _range,
    "ReduceMax": _reduce(np.max),
    "ReduceMin": _reduce(np.min),
    "ReduceProd": _reduce(np.prod),
    "ReduceSum": _reduce(np.sum),
    "Reshape": _reshape,
    "Round": _of(np.round),
    "ScatterND": _scatter_nd,
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _of(np.sqrt),
    "Squeeze": _squeeze,
    "Sub": _of(np.subtract),
    "Tile": lambda inputs, _attributes: np.tile(inputs[0], _ints(inputs, 1)),
    "Transpose": lambda inputs, attributes: np.transpose(inputs[0], attributes.get("perm")),
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
    "Where": _of(np.where),
    "Xor": _of(np.logical_xor),
}
"""By operator."""
