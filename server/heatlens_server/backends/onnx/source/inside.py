"""What a graph itself does to its input before the first layer: normalisation that is inside must not be done twice."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.find import ImageInput
from heatlens_server.backends.onnx.gradient.inference import infer
from heatlens_server.backends.onnx.gradient.tape import Array
from heatlens_server.backends.onnx.gradient.values import open_graph
from heatlens_server.backends.onnx.packed import OpenGraph
from heatlens_server.config import IMAGENET_PREPROCESS
from heatlens_server.core.errors import ModelLoadError

PREPARING = frozenset({
    "Add", "Cast", "Clip", "Concat", "ConstantOfShape", "DequantizeLinear", "Div", "Expand", "Flatten", "Gather",
    "Identity", "Mul", "Pad", "QuantizeLinear", "Range", "Reshape", "Resize", "Shape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Operators that prepare an image, or shape it; the first other one is a layer."""

_TOLERANCE = 0.02
"""Of a factor of 1 and an offset of 0: a file that quantises its input rounds it."""

_LARGEST_BATCH = 1024

_LARGEST_UNIT_STD = 10.0
_LARGEST_UNIT_MEAN = 2.0
_HIGHEST = 255.0


@dataclass(frozen=True, slots=True)
class Inside:
    """What a graph does to its input: value * factor + offset, for each channel of the input.

    Attributes:
        factors: not 0.
        offsets: as many.
    """

    factors: tuple[float, ...]
    offsets: tuple[float, ...]

    @property
    def is_nothing(self) -> bool:
        """Whether the values reach the first layer as they are."""
        return np.allclose(self.factors, 1.0, 0, _TOLERANCE) and np.allclose(self.offsets, 0.0, 0, _TOLERANCE)

    @property
    def in_words(self) -> str:
        """What is done, as a formula."""
        factors, offsets = ([round(value, 4) for value in values] for values in (self.factors, self.offsets))
        return f"times {factors}, plus {offsets}"

    @property
    def highest(self) -> float:
        """What white is for the graph, 1 or 255: that which a mean and std of this size are for."""
        means = [abs(offset / factor) for factor, offset in zip(self.factors, self.offsets, strict=True)]
        stds = [abs(1 / factor) for factor in self.factors]
        return _HIGHEST if max(stds) > _LARGEST_UNIT_STD or max(means) > _LARGEST_UNIT_MEAN else 1.0

    @property
    def is_bgr(self) -> bool:
        """Whether ImageNet's means are subtracted in the order blue, green, red."""
        means = [-offset / factor / self.highest for factor, offset in zip(self.factors, self.offsets, strict=True)]
        expected = IMAGENET_PREPROCESS.mean[::-1]
        return len(means) == len(expected) and np.allclose(means, expected, 0, _TOLERANCE)


def find_inside(model: ir.Model, image: ImageInput, size_px: tuple[int, int]) -> Inside | None:
    """Run the part of a graph before its first layer on images of one value, and one more in one channel.

    Args:
        model: from `read_file`.
        image: its input.
        size_px: (height, width) of an image that it takes.

    Returns:
        What is done to each channel; None if a channel has no effect there, or there is no such layer.

    Raises:
        ModelLoadError: the part does not run.
    """
    first = first_layers_input(model, image.value)
    if first is None:
        return None
    if first is image.value:
        return Inside((1.0,) * image.channels, (0.0,) * image.channels)
    run = part_before(model, first, image)
    black_pixels = np.zeros((1, *image.shape(*size_px)), (image.value.dtype or ir.DataType.FLOAT).numpy())
    black = run(black_pixels).ravel()
    factors, offsets = [], []
    for channel in range(image.channels):
        pixels = black_pixels.copy()
        np.moveaxis(pixels, 3 if image.channels_last else 1, 0)[channel] = 1
        change = run(pixels).ravel() - black
        # Wherever the layout puts it: where the channel has most effect. Padding has none.
        place = int(np.abs(change).argmax())
        factors.append(float(change[place]))
        offsets.append(float(black[place]))
    return Inside(tuple(factors), tuple(offsets)) if all(factors) else None


def part_before(model: ir.Model, value: ir.Value, image: ImageInput) -> Callable[[Array], Array]:
    """Open the part of a graph that computes a value.

    Returns:
        A function from the input of one image, (1, ...), to the value, as float64.

    Raises:
        ModelLoadError: the part does not open, or, from the function, does not run.
    """
    copy = model.clone()
    values = (one for node in copy.graph for one in node.outputs)
    copy.graph.outputs[:] = [one for one in (*copy.graph.inputs, *values) if one.name == value.name]
    common.RemoveUnusedNodesPass()(copy)
    batch = image.value.shape[0] if image.value.shape is not None else 1
    count = batch if isinstance(batch, int) and batch > 0 else 1
    if count > _LARGEST_BATCH:
        raise ModelLoadError(f"the file's input {image.value.name!r} is of {count} images, more than {_LARGEST_BATCH}")

    @functools.cache
    def session(*shape: int) -> OpenGraph:
        # What would take too much memory is refused by its size.
        facts = infer(copy, next(one for one in copy.graph.inputs if one.name == image.value.name), shape)
        if not facts.unbounded.isdisjoint(copy.graph.outputs):
            raise ModelLoadError(f"the size of {value.name!r} depends on the image's pixels")
        return open_graph(copy)

    def run(pixels: Array) -> Array:
        try:
            (found,) = session(count, *pixels.shape[1:]).run(
                None, {str(image.value.name): pixels.repeat(count, axis=0)}
            )
        except ModelLoadError:
            raise
        # onnxruntime has an exception class for each of its status codes, and paths in their messages.
        except Exception as error:
            raise ModelLoadError(
                f"the file does not run on an input of {pixels.shape[1:]} ({type(error).__name__})"
            ) from error
        return np.asarray(found[: len(found) // count], np.float64)

    return run


def first_layers_input(model: ir.Model, image: ir.Value) -> ir.Value | None:
    """What the first layer of a graph gets: an image that is prepared, or the input; None if there is no layer."""
    prepared = {image}
    for node in model.graph:
        read = [value for value in node.inputs if value in prepared]
        if read and node.op_type not in PREPARING:
            return read[0]
        # What is computed of the image's size, such as that of a padding, holds no pixels.
        if read and node.op_type != "Shape":
            prepared.update(node.outputs)
    return None
