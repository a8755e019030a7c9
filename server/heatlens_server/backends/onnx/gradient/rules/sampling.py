"""Rules of GridSample, which reads an image at computed places, and of AffineGrid, which computes such places.

Places and their slopes are those of torch.nn.functional.grid_sample: 0 where a place was moved to the border.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Gradients, NotDifferentiable, Rule, Tape, input_of, only


@dataclass(frozen=True, slots=True)
class _Reads:
    """What is read along one axis of the image: one pixel for each of p places if the nearest, or else two.

    Attributes:
        pixels: (N, taps, p), whole numbers in the image.
        weights: (N, taps, p); 0 for pixels outside of the image.
        changes: of the weights by the place, in pixels; the same shape.
        slope: of the place by the grid's coordinate, (N, p) or of one element.
    """

    pixels: ir.Value
    weights: ir.Value
    changes: ir.Value
    slope: ir.Value


def _grid_sample(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    x, grid = input_of(node, 0), input_of(node, 1)
    shape, mode = tape.shape(x), node.attributes["mode"].as_string()
    if len(shape) != 4 or mode not in {"bilinear", "linear", "nearest"}:
        raise NotDifferentiable(f"GridSample of {len(shape)} dimensions, mode {mode!r}")
    channels, height, width = shape[1:]
    count = int(np.prod(tape.shape(grid)[1:3]))
    if min(channels, height, width, count) < 0:
        raise NotDifferentiable("GridSample of images of unknown size")
    taps = 1 if mode == "nearest" else 2
    across, down = (_reads(node, axis, length, taps, tape) for axis, length in ((0, width), (1, height)))
    rows = tape.op("Mul", tape.op("Unsqueeze", down.pixels, tape.ints(2)), tape.number(float(width)))
    number = tape.op("Cast", tape.op("Add", rows, _beside(across.pixels, tape)), to=int(ir.DataType.INT64))
    flat = tape.op("Reshape", number, tape.ints(-1, 1, taps * taps * count))
    index = tape.op("Expand", flat, tape.ints(1, channels, 1))
    gradient = tape.op("Reshape", only(gradients), tape.ints(-1, channels, 1, 1, count))
    found: list[ir.Value | None] = [None, None]
    if tape.wanted(x):
        weights = tape.op("Unsqueeze", _pairs(down.weights, across.weights, tape), tape.ints(1))
        updates = tape.op("Reshape", tape.op("Mul", gradient, weights), tape.ints(-1, channels, taps * taps * count))
        zeros = tape.op("Reshape", tape.zeros_like(x), tape.ints(-1, channels, height * width))
        found[0] = tape.reshape(tape.scatter_add("ScatterElements", zeros, index, updates, axis=2), x)
    if tape.wanted(grid):
        image = tape.op("Reshape", x, tape.ints(-1, channels, height * width))
        read = tape.op("GatherElements", image, index, axis=2)
        read = tape.op("Reshape", read, tape.ints(-1, channels, taps, taps, count))
        worth = tape.sum(tape.op("Mul", read, gradient), [1], keepdims=False)
        changes = (
            (_pairs(down.weights, across.changes, tape), across.slope),
            (_pairs(down.changes, across.weights, tape), down.slope),
        )
        parts = [
            tape.op("Mul", tape.sum(tape.op("Mul", worth, change), [1, 2], keepdims=False), slope)
            for change, slope in changes
        ]
        both = tape.op("Concat", *(tape.op("Unsqueeze", part, tape.ints(2)) for part in parts), axis=2)
        found[1] = tape.reshape(both, grid)
    return found


def _beside(across: ir.Value, tape: Tape) -> ir.Value:
    return tape.op("Unsqueeze", across, tape.ints(1))


def _pairs(down: ir.Value, across: ir.Value, tape: Tape) -> ir.Value:
    """The product for each pixel that is read: (N, taps down, taps across, p)."""
    return tape.op("Mul", tape.op("Unsqueeze", down, tape.ints(2)), _beside(across, tape))


def _reads(node: ir.Node, axis: int, length: int, taps: int, tape: Tape) -> _Reads:
    """What is read along an axis: 0 is the grid's x, 1 its y."""
    at, slope = _places(node, axis, length, tape)
    at = tape.op("Unsqueeze", at, tape.ints(1))
    steps = tape.constant(np.arange(taps)[:, None], tape.known.dtype.numpy())
    pixels = tape.op("Add", tape.op("Round" if taps == 1 else "Floor", at), steps)
    inside = tape.op("Clip", pixels, tape.number(0.0), tape.number(length - 1.0))
    is_inside = tape.cast(tape.op("Equal", pixels, inside))
    if taps == 1:
        return _Reads(inside, is_inside, tape.op("Mul", is_inside, tape.number(0.0)), slope)
    distance = tape.op("Abs", tape.op("Sub", at, pixels))
    weights = tape.op("Mul", tape.op("Sub", tape.number(1.0), distance), is_inside)
    ways = tape.constant([[-1.0], [1.0]], tape.known.dtype.numpy())
    return _Reads(inside, weights, tape.op("Mul", is_inside, ways), slope)


def _places(node: ir.Node, axis: int, length: int, tape: Tape) -> tuple[ir.Value, ir.Value]:
    """The places (N, p) that the grid names along an axis, in pixels, and their slope by its coordinates."""
    aligned, padding = node.attributes["align_corners"].as_int(), node.attributes["padding_mode"].as_string()
    given = tape.op("Gather", input_of(node, 1), tape.constant(axis, np.int64), axis=3)
    half = (length - 1) / 2 if aligned else length / 2
    at = tape.op("Mul", tape.op("Flatten", given, axis=1), tape.number(half))
    at, slope = tape.op("Add", at, tape.number((length - 1) / 2)), tape.number(half)
    if padding == "zeros":
        return at, slope
    if padding == "reflection":
        at, slope = _reflected(at, slope, (0.0, length - 1.0) if aligned else (-0.5, length - 0.5), tape)
    low, high = tape.number(0.0), tape.number(length - 1.0)
    is_inside = tape.cast(tape.op("And", tape.op("Greater", at, low), tape.op("Less", at, high)))
    return tape.op("Clip", at, low, high), tape.op("Mul", is_inside, slope)


def _reflected(at: ir.Value, slope: ir.Value, bounds: tuple[float, float], tape: Tape) -> tuple[ir.Value, ir.Value]:
    """Fold places back between bounds, with period 2 (high - low): a triangle wave."""
    low, high = bounds
    if high <= low:
        return tape.op("Mul", at, tape.number(0.0)), slope
    past = tape.op("Sub", at, tape.number(low))
    turns = tape.op("Div", past, tape.number(2.0 * (high - low)))
    # In [0, 2 (high - low)), of which the second half runs backward.
    folded = tape.op("Mul", tape.op("Sub", turns, tape.op("Floor", turns)), tape.number(2.0 * (high - low)))
    is_back = tape.op("Greater", folded, tape.number(high - low))
    back = tape.op("Sub", tape.number(2.0 * (high - low)), folded)
    way = tape.op("Where", is_back, tape.number(-1.0), tape.number(1.0))
    return (
        tape.op("Add", tape.op("Where", is_back, back, folded), tape.number(low)),
        tape.op("Mul", way, slope),
    )


def _affine_grid(node: ir.Node, gradients: Gradients, tape: Tape) -> Gradients:
    """Each place is theta times (x, y, 1), its own coordinates in [-1, 1]: the gradient's product with these."""
    _n, *lengths = tape.shape(node.outputs[0])
    if len(lengths) != 3:
        raise NotDifferentiable("AffineGrid of volumes")
    reach = [1.0 if node.attributes["align_corners"].as_int() else 1.0 - 1.0 / length for length in lengths[:2]]
    down, across = (np.linspace(-one, one, length) for one, length in zip(reach, lengths[:2], strict=True))
    rows, columns = np.meshgrid(down, across, indexing="ij")
    own = np.stack([columns.ravel(), rows.ravel(), np.ones(rows.size)], 1)
    flat = tape.op("Reshape", only(gradients), tape.ints(-1, rows.size, 2))
    turned = tape.op("Transpose", flat, perm=[0, 2, 1])
    return [tape.op("MatMul", turned, tape.constant(own, tape.known.dtype.numpy())), None]


RULES: Mapping[str, Rule] = {"AffineGrid": _affine_grid, "GridSample": _grid_sample}
"""By operator."""
