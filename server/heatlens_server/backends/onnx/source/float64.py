"""Operators of the forward pass in float64, by numpy.

onnxruntime lacks most of them in float64. Those here are what onnx's reference implementation computes slowly, or in
float32, or wrongly; it computes all others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from onnx.reference import ReferenceEvaluator

from heatlens_server.backends.onnx.gradient.rules.windows import Window, cropped_window, read_window, reference_of
from heatlens_server.backends.onnx.gradient.tape import Array

Inputs = Sequence[Array | None]
"""Of a node, in float64 if they are floating point; None where one is absent."""


class Float64:
    """Runs nodes in float64."""

    def __init__(self, opset: int) -> None:
        """Run nothing yet.

        Args:
            opset: the version of ONNX's operators.
        """
        self._opset = opset
        self._references: dict[ir.Node, ReferenceEvaluator] = {}
        self._matrices: dict[tuple[ir.Node, int], Array] = {}

    def run(self, node: ir.Node, inputs: Inputs, *, rounding: bool) -> Sequence[Array]:
        """Run a node.

        Args:
            node: the operator, with its default attributes.
            inputs: its.
            rounding: whether quantisers round. They clip in any case.

        Returns:
            Its outputs, in float64 if they are floating point.
        """
        if node.op_type in _QUANTISED:
            return _QUANTISED[node.op_type](node, inputs, rounding)
        if node.op_type == "Resize":
            return [self._resize(node, inputs)]
        # Their further outputs are places, which nothing is differentiated by.
        own = _OPERATORS.get(node.op_type) if len(node.outputs) == 1 else None
        outputs = self._by_reference(node, inputs) if own is None else [own(node, inputs)]
        return [in_float64(output) for output in outputs]

    def _by_reference(self, node: ir.Node, inputs: Inputs) -> Sequence[Any]:
        if node not in self._references:
            self._references[node] = reference_of(node, [array is not None for array in inputs], self._opset)
        return _outputs(self._references[node], inputs)

    def _resize(self, node: ir.Node, inputs: Inputs) -> Array:
        """A matrix along each axis, which the reference implementation gives for unit vectors."""
        found, scales, sizes = _present(inputs), _optional(inputs, 2), _optional(inputs, 3)
        axes = node.attributes["axes"].as_ints() if "axes" in node.attributes else range(found.ndim)
        if node.attributes["keep_aspect_ratio_policy"].as_string() != "stretch":
            return in_float64(self._by_reference(node, inputs)[0])
        for place, axis in enumerate(axes):
            if (node, axis) not in self._matrices:
                units = np.eye(found.shape[axis])
                # Of rows of units, the first axis stays.
                scale = None if scales is None or not scales.size else np.array([1.0, scales[place]], np.float32)
                size = None if sizes is None or not sizes.size else np.array([len(units), sizes[place]], np.int64)
                given = [units, None, scale, size]
                reference = reference_of(node, [one is not None for one in given], self._opset, without=("axes",))
                (self._matrices[node, axis],) = _outputs(reference, given)
            found = np.moveaxis(np.moveaxis(found, axis, -1) @ self._matrices[node, axis], -1, axis)
        return found


def _outputs(reference: ReferenceEvaluator, inputs: Inputs) -> Sequence[Any]:
    """Run what `reference_of` gives."""
    return list(reference.run(None, {f"x{place}": array for place, array in enumerate(inputs) if array is not None}))


def in_float64(given: npt.ArrayLike) -> Array:
    """Floating point numbers as float64; others as they are."""
    array = np.asarray(given)
    return array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array


def _int(node: ir.Node, name: str) -> int:
    return node.attributes[name].as_int()


def _float(node: ir.Node, name: str) -> float:
    return node.attributes[name].as_float()


def _present(inputs: Inputs, place: int = 0) -> Array:
    """An input that must be there."""
    array = inputs[place]
    assert array is not None
    return array


def _optional(inputs: Inputs, place: int) -> Array | None:
    return inputs[place] if place < len(inputs) else None


def _per_channel(vector: Array, rank: int, axis: int = 1) -> Array:
    """A vector, to be broadcast along one axis."""
    return vector.reshape([-1 if place == axis % rank else 1 for place in range(rank)])


# Windows.


def _windows(padded: Array, window: Window) -> Array:
    """A view (N, C, *places, *taps) of every place of a window on a padded input."""
    spatial = len(window.kernel)
    reach = [(size - 1) * dilation + 1 for size, dilation in zip(window.kernel, window.dilations, strict=True)]
    view = sliding_window_view(padded, reach, tuple(range(2, 2 + spatial)))
    steps: list[Any] = [slice(None, None, step) for step in (*window.strides, *window.dilations)]
    return view[:, :, *steps]


def _padded(x: Array, before: Sequence[int], after: Sequence[int], fill: float) -> Array:
    return np.pad(x, [(0, 0), (0, 0), *zip(before, after, strict=True)], constant_values=fill)


def _conv_of(node: ir.Node, x: Array, weights: Array) -> Array:
    """Products of a matrix of all windows, one for each group of channels."""
    window, group = read_window(node, weights.shape[2:], x.shape[2:]), _int(node, "group")
    view = _windows(_padded(x, window.before, window.after, 0.0), window)
    places = view.shape[2 : 2 + len(window.kernel)]
    columns = np.moveaxis(view, 1, 1 + len(places)).reshape(len(x), math.prod(places), group, -1)
    found = columns.swapaxes(1, 2) @ weights.reshape(group, len(weights) // group, -1).swapaxes(1, 2)
    return found.swapaxes(2, 3).reshape(len(x), len(weights), *places)


def _conv(node: ir.Node, inputs: Inputs) -> Array:
    found = _conv_of(node, _present(inputs), _present(inputs, 1))
    bias = _optional(inputs, 2)
    return found if bias is None else found + _per_channel(bias, found.ndim)


def _conv_transpose(node: ir.Node, inputs: Inputs) -> Array:
    """Every element is spread over a window; overlapping ones add up."""
    x, weights = _present(inputs), _present(inputs, 1)
    (count, channels, *sizes), kernel, group = x.shape, weights.shape[2:], _int(node, "group")
    rest = node.attributes["output_padding"].as_ints() if "output_padding" in node.attributes else [0] * len(kernel)
    strides = np.array(read_window(node, kernel, sizes).strides)
    wanted = node.attributes["output_shape"].as_ints() if "output_shape" in node.attributes else sizes * strides
    window = cropped_window(node, kernel, sizes, wanted)
    columns = x.reshape(count, group, channels // group, -1)
    parts = weights.reshape(group, channels // group, -1).swapaxes(1, 2) @ columns
    parts = parts.reshape(count, -1, *kernel, *sizes)
    dilations = np.array(window.dilations)
    reached = (np.array(sizes) - 1) * strides + 1
    full = reached + (np.array(kernel) - 1) * dilations + rest
    found = np.zeros((count, parts.shape[1], *full))
    for tap in np.ndindex(*kernel):
        starts = np.array(tap) * dilations
        target: list[Any] = [slice(*one) for one in zip(starts, starts + reached, strides, strict=True)]
        found[:, :, *target] += parts[:, :, *tap]
    ends = zip(window.before, full, window.after, strict=True)
    kept: list[Any] = [slice(before, size - after) for before, size, after in ends]
    found, bias = found[:, :, *kept], _optional(inputs, 2)
    return found if bias is None else found + _per_channel(bias, found.ndim)


def _pooling(node: ir.Node, sizes: Sequence[int]) -> tuple[Window, Sequence[int]]:
    """A pooling's window, and how far the last one reaches over each axis's end and padding."""
    window = read_window(node, node.attributes["kernel_shape"].as_ints(), sizes)
    if not _int(node, "ceil_mode"):
        return window, [0] * len(sizes)
    over = []
    for axis, size in enumerate(sizes):
        reach, step = (window.kernel[axis] - 1) * window.dilations[axis] + 1, window.strides[axis]
        length = size + window.before[axis] + window.after[axis]
        steps = -(-(length - reach) // step)
        # A window that starts behind the input is left out.
        steps -= steps * step >= size + window.before[axis]
        over.append(max(0, steps * step + reach - length))
    return window, over


def _max_pool(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    window, over = _pooling(node, x.shape[2:])
    after = np.add(window.after, over)
    places = _windows(_padded(x, window.before, list(after), -np.inf), window)
    return np.asarray(places.max(tuple(range(-len(over), 0))))


def _average_pool(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    window, over = _pooling(node, x.shape[2:])
    axes, nothing = tuple(range(-len(over), 0)), [0] * len(over)
    counted = _padded(
        np.ones((1, 1, *x.shape[2:])), window.before, window.after, float(_int(node, "count_include_pad"))
    )
    sums, counts = (
        _windows(_padded(part, nothing, over, 0.0), window).sum(axes)
        for part in (_padded(x, window.before, window.after, 0.0), counted)
    )
    return np.asarray(sums / counts)


# Functions of single elements.


_ERF_STEPS = 1024
_ERF_END = 6.0
_ERF_PLACES = np.arange(-_ERF_END * _ERF_STEPS, _ERF_END * _ERF_STEPS + 1) / _ERF_STEPS
_ERF_VALUES = np.array([math.erf(place) for place in _ERF_PLACES])
_ERF_SLOPES = 2.0 / math.sqrt(math.pi) * np.exp(-(_ERF_PLACES**2))


def _erf_of(x: Array) -> Array:
    """Taylor's series to the fourth power about the nearest of 1024 places in a unit: to 2e-16."""
    near = np.rint(np.clip(x, -_ERF_END, _ERF_END) * _ERF_STEPS)
    index = (near + _ERF_END * _ERF_STEPS).astype(np.int64)
    place = near / _ERF_STEPS
    step, square = np.clip(x, -_ERF_END, _ERF_END) - place, place * place
    third = step * ((2.0 * square - 1.0) / 3.0 - step * place * (2.0 * square - 3.0) / 6.0)
    found: Array = _ERF_VALUES[index] + _ERF_SLOPES[index] * step * (1.0 - step * (place - third))
    return found


def _erf(_node: ir.Node, inputs: Inputs) -> Array:
    return _erf_of(_present(inputs))


def _gelu(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    if node.attributes["approximate"].as_string() == "tanh":
        return np.asarray(x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))) / 2.0)
    return np.asarray(x * (1.0 + _erf_of(x / math.sqrt(2.0))) / 2.0)


def _cast(node: ir.Node, inputs: Inputs) -> Array:
    """To floating point types of any width: stays as exact as it is."""
    target = ir.DataType(_int(node, "to"))
    return _present(inputs).astype(np.float64 if target.is_floating_point() else target.numpy())


def _mean(_node: ir.Node, inputs: Inputs) -> Array:
    return np.asarray(sum(array for array in inputs if array is not None) / len(inputs))


# Normalisations.


def _layer_normalization(node: ir.Node, inputs: Inputs) -> Array:
    x, bias = _present(inputs), _optional(inputs, 2)
    axes = tuple(range(_int(node, "axis") % x.ndim, x.ndim))
    centred = x - x.mean(axes, keepdims=True)
    found = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + _float(node, "epsilon")) * _present(inputs, 1)
    return np.asarray(found if bias is None else found + bias)


def _lp_normalization(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    return np.asarray(x / np.linalg.norm(x, _int(node, "p"), _int(node, "axis"), keepdims=True))


def _lrn(node: ir.Node, inputs: Inputs) -> Array:
    """As the specification has it."""
    x, size = _present(inputs), _int(node, "size")
    ends = [(0, 0), ((size - 1) // 2, size // 2), *[(0, 0)] * (x.ndim - 2)]
    sums = sliding_window_view(np.pad(x * x, ends), size, 1).sum(-1)
    return np.asarray(x / (_float(node, "bias") + _float(node, "alpha") / size * sums) ** _float(node, "beta"))


# Moving elements.


def _pad(node: ir.Node, inputs: Inputs) -> Array:
    """By numpy's modes, which have the same names; negative ends are cut off."""
    x, pads, fill, given = _present(inputs), _present(inputs, 1), _optional(inputs, 2), _optional(inputs, 3)
    ends = np.zeros((x.ndim, 2), np.int64)
    ends[slice(None) if given is None else given] = pads.reshape(2, -1).T
    cut = tuple(slice(max(0, -one), size + min(0, other)) for size, (one, other) in zip(x.shape, ends, strict=True))
    mode: Any = node.attributes["mode"].as_string()
    more = {"constant_values": 0.0 if fill is None else fill.item()} if mode == "constant" else {}
    padded: Array = np.pad(x[cut], np.maximum(ends, 0), mode, **more)
    return padded


def _places(index: Array, axis: int, shape: Sequence[int]) -> tuple[Array, ...]:
    """Where the elements lie that GatherElements and ScatterElements mean."""
    places: list[Array] = list(np.indices(index.shape, sparse=True))
    places[axis] = index % shape[axis]
    return tuple(places)


def _gather_elements(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    return x[_places(_present(inputs, 1), _int(node, "axis"), x.shape)]


def _scatter_elements(node: ir.Node, inputs: Inputs) -> Array:
    x = _present(inputs)
    return _scattered(node, x, _places(_present(inputs, 1), _int(node, "axis"), x.shape), _present(inputs, 2))


def _scatter_nd(node: ir.Node, inputs: Inputs) -> Array:
    return _scattered(node, _present(inputs), tuple(np.moveaxis(_present(inputs, 1), -1, 0)), _present(inputs, 2))


def _scattered(node: ir.Node, x: Array, places: tuple[Array, ...], updates: Array) -> Array:
    found, reduction = x.copy(), node.attributes["reduction"].as_string()
    if reduction == "none":
        found[places] = updates
    else:
        _REDUCTIONS[reduction].at(found, places, updates)
    return found


_REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}


# Quantised networks.


def _per_axis(node: ir.Node, numbers: Array, x: Array) -> Array:
    return numbers.reshape(()) if numbers.size == 1 else _per_channel(numbers, x.ndim, _int(node, "axis"))


def _quantize_linear(node: ir.Node, inputs: Inputs, rounding: bool) -> Sequence[Array]:
    x, zero_point = _present(inputs), _optional(inputs, 2)
    # Without a zero point it is of no type but this before opset 21.
    given = _int(node, "output_dtype") if "output_dtype" in node.attributes else 0
    kind = ir.DataType(given or ir.DataType.UINT8) if zero_point is None else ir.DataType.from_numpy(zero_point.dtype)
    least = -(2.0 ** (kind.bitwidth - 1)) if kind.is_signed() else 0.0
    found = x / _per_axis(node, _present(inputs, 1), x)
    found = np.rint(found) if rounding else found
    if zero_point is not None:
        found = found + _per_axis(node, zero_point.astype(np.float64), x)
    found = np.clip(found, least, least + 2.0**kind.bitwidth - 1)
    return [found.astype(kind.numpy()) if rounding else found]


def _dequantize_linear(node: ir.Node, inputs: Inputs, _rounding: bool) -> Sequence[Array]:
    x, zero_point = _present(inputs).astype(np.float64), _optional(inputs, 2)
    if zero_point is not None:
        x = x - _per_axis(node, zero_point.astype(np.float64), x)
    return [x * _per_axis(node, _present(inputs, 1), x)]


def _dynamic_quantize_linear(_node: ir.Node, inputs: Inputs, rounding: bool) -> Sequence[Array]:
    x = _present(inputs)
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    scale = (high - low) / 255.0
    zero_point = np.clip(np.rint(-low / scale), 0, 255)
    if not rounding:
        return [x / scale + zero_point, np.array(scale), np.array(zero_point)]
    found = np.clip(np.rint(x / scale) + zero_point, 0, 255)
    return [found.astype(np.uint8), np.array(scale), np.array(zero_point, np.uint8)]


def _shifted(inputs: Inputs, place: int, *lengths: int) -> Array:
    """Integers less their zero point."""
    numbers, zero_point = _present(inputs, place).astype(np.float64), _optional(inputs, place + 2)
    if zero_point is None:
        return numbers
    shift = zero_point.astype(np.float64)
    return numbers - (shift.reshape(()) if shift.size == 1 else shift.reshape(lengths))


def _mat_mul_integer(_node: ir.Node, inputs: Inputs, rounding: bool) -> Sequence[Array]:
    found = _shifted(inputs, 0, -1, 1) @ _shifted(inputs, 1, 1, -1)
    return [found.astype(np.int32) if rounding else found]


def _conv_integer(node: ir.Node, inputs: Inputs, rounding: bool) -> Sequence[Array]:
    weights = _shifted(inputs, 1, -1, *[1] * (_present(inputs).ndim - 1))
    found = _conv_of(node, _shifted(inputs, 0), weights)
    return [found.astype(np.int32) if rounding else found]


# Spatial transformers.


def _affine_grid(node: ir.Node, inputs: Inputs) -> Array:
    """Theta times (x, y, 1), the coordinates of pixels in [-1, 1]."""
    theta, (_n, _c, *lengths) = _present(inputs), _present(inputs, 1)
    ends = [1.0 if _int(node, "align_corners") else 1.0 - 1.0 / length for length in lengths]
    axes = [np.linspace(-end, end, length) for end, length in zip(ends, lengths, strict=True)]
    places = np.meshgrid(*axes, indexing="ij")[::-1]
    return np.asarray(np.einsum("nij,j...->n...i", theta, np.stack([*places, np.ones(lengths)])))


def _grid_sample(node: ir.Node, inputs: Inputs) -> Array:
    """Pixels by how near they are to each place: max(0, 1 - distance) along each axis. Of images of two dimensions."""
    x, grid = _present(inputs), _present(inputs, 1)
    padding, mode = node.attributes["padding_mode"].as_string(), node.attributes["mode"].as_string()
    weights = []
    for axis, length in enumerate(x.shape[:1:-1]):
        # The ends of the image are the centres of its outer pixels, or their edges.
        edge = 0.0 if _int(node, "align_corners") else 0.5
        size = length - 1.0 + 2.0 * edge
        places = (grid[..., axis] + 1.0) / 2.0 * size
        if padding == "reflection":
            places = size - np.abs(places % (2.0 * size) - size)
        places = places - edge if padding == "zeros" else np.clip(places - edge, 0.0, length - 1.0)
        places = np.rint(places) if mode == "nearest" else places
        distances = np.abs(places.reshape(len(x), -1, 1) - np.arange(length))
        weights.append(np.maximum(0.0, 1.0 - distances))
    found = np.einsum("nchw,npw,nph->ncp", x, *weights, optimize=True)
    return np.asarray(found).reshape(*x.shape[:2], *grid.shape[1:3])


_OPERATORS: Mapping[str, Callable[[ir.Node, Inputs], Array]] = {
    "AffineGrid": _affine_grid,
    "AveragePool": _average_pool,
    "Cast": _cast,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Erf": _erf,
    "GatherElements": _gather_elements,
    "Gelu": _gelu,
    "GridSample": _grid_sample,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Pad": _pad,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
}
"""By operator; of its first output."""

_QUANTISED: Mapping[str, Callable[[ir.Node, Inputs, bool], Sequence[Array]]] = {
    "ConvInteger": _conv_integer,
    "DequantizeLinear": _dequantize_linear,
    "DynamicQuantizeLinear": _dynamic_quantize_linear,
    "MatMulInteger": _mat_mul_integer,
    "QuantizeLinear": _quantize_linear,
}
"""By operator; all outputs, of rounded numbers or not."""
