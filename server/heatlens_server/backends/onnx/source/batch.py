"""Files that were exported for a fixed number of images: graphs that take any number instead. Files of random scores.

The axis that carries the images is followed from the input on. Where a node names their number, as a Reshape does, it
is left open. The result is tried: several images at once must give what each of them gives by itself.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.tape import Array, Shape
from heatlens_server.backends.onnx.gradient.values import facts_of, noise_for, open_graph, part_of
from heatlens_server.backends.onnx.source.batch_axis import LosesImages, Place, Walk, follow, name_axes
from heatlens_server.core.errors import ModelLoadError

_BATCH_NAME = "batch"

_IMAGES = 3
_ROUNDINGS = 16
"""Rounding errors of the largest output that are allowed: for other numbers of images kernels sum in another order."""

_SHARE_OF_SPREAD = 1e-3
"""The same, as a share of how far the outputs of different images are apart. Of mixed images the share is about 1."""

_LEAST_SPREAD = 4.0
"""How far they must be apart to prove anything, in multiples of the allowed rounding."""

_RANDOM = frozenset(
    {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

_MOST_REPEAT_ERROR = 1e-5
"""Of two runs on one image, relative to the largest output."""


def free_batch(model: ir.Model, image: ir.Value, shape: Sequence[int]) -> bool:
    """Make a graph take any number of images.

    Args:
        model: from `read_file`; rewritten in place, or left as it is.
        image: its input.
        shape: of one image, without the batch.

    Returns:
        Whether it takes any number, now or as it was; False if some node loses the images. Whether it keeps them
        apart is for `runs_in_batches` to say.

    Raises:
        ModelLoadError: the graph cannot be run.
    """
    count = image.shape[0] if image.shape is not None else None
    if not isinstance(count, int):
        return True
    for value in (output for node in model.graph for output in node.outputs):
        # What the file says is for its number of images.
        value.shape = None
    number, shapes = ir.Value(name=f"{image.name}: number"), facts_of(model, image, (count, *shape)).shapes
    if count == 1 and _keep_one_image(model, image, shapes):
        shapes = facts_of(model, image, (count, *shape)).shapes
    walk = Walk(model.graph, shapes, count, number, {image: Place(0)})
    try:
        for node in model.graph:
            follow(node, walk)
    # Or a shape that is not known: it is behind the choice of boxes.
    except (LosesImages, KeyError):
        return False
    carriers = [value for value in (image, *model.graph.outputs) if value in walk.places]
    if len(carriers) < 2:
        return False
    for edit in walk.edits:
        edit()
    model.graph.insert_before(model.graph[0], ir.node("Shape", [image], {"start": 0, "end": 1}, outputs=[number]))
    common.AddDefaultAttributesPass()(model)
    common.RemoveUnusedNodesPass()(model)
    for value in carriers:
        lengths: list[int | str] = list(walk.shapes[value])
        lengths[walk.places[value].axis] = _BATCH_NAME
        value.shape = ir.Shape(lengths)
    return True


def runs_in_batches(model: ir.Model, image: ir.Value, shape: Sequence[int], outputs: Sequence[ir.Value]) -> bool:
    """Whether three images at once give what each of them gives by itself, to rounding.

    Args:
        model: that takes any number of images.
        image: its input.
        shape: of one image, without the batch.
        outputs: what is compared: floating point values of the graph whose first axis is the batch.

    Returns:
        False as well if the file does not run, if it quantises all images by one scale, or if different images give
        the same outputs, which proves nothing.
    """
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph):
        return False
    # Of different brightness: statistics of three of them are not those of one.
    contrasts = np.linspace(1.0, 0.3, _IMAGES).reshape(-1, *[1] * len(shape))
    noise = noise_for(image, (_IMAGES, *shape))
    images = (noise * contrasts).astype(noise.dtype)
    try:
        session = open_graph(part_of(model, outputs))
        together = session.run(None, {str(image.name): images})
        each = [session.run(None, {str(image.name): images[place : place + 1]}) for place in range(_IMAGES)]
    # onnxruntime has an exception class for each of its status codes.
    except Exception:
        return False
    return all(_agree(batch, singles) for batch, singles in zip(together, zip(*each, strict=True), strict=True))


def check_repeats(model: ir.Model, image: ir.Value, shape: Sequence[int], outputs: Sequence[ir.Value]) -> None:
    """Check that a file with random operators gives one image the same outputs each time it runs.

    Args:
        model: from `read_file`.
        image: its input.
        shape: of one image, without the batch.
        outputs: what is compared: floating point values of the graph.

    Raises:
        ModelLoadError: it does not; names its random operators. Or the graph cannot be run.
    """
    part = part_of(model, outputs)
    operators = {node.op_type for node in part.graph} & _RANDOM
    if not operators:
        return
    count = image.shape[0] if image.shape is not None and isinstance(image.shape[0], int) else 1
    # One session: the random numbers of each new one may begin anew.
    session, feeds = open_graph(part), {str(image.name): noise_for(image, (count, *shape))}
    for first, second in zip(session.run(None, feeds), session.run(None, feeds), strict=True):
        bound = _MOST_REPEAT_ERROR * float(np.abs(first).max(initial=0.0))
        if not np.allclose(first, second, rtol=0.0, atol=bound, equal_nan=True):
            raise ModelLoadError(
                f"the file gives one image other scores each time it runs (operators {', '.join(sorted(operators))}): "
                "no map of it means anything; export the network to ONNX in evaluation mode"
            )


def _agree(batch: Array, singles: Sequence[Array]) -> bool:
    """Whether outputs of a batch are those of its images; False if those are too close to each other to tell."""
    if any((len(singles), *one.shape[1:]) != batch.shape or len(one) != 1 for one in singles):
        return False
    expected = np.concatenate(singles).astype(np.float64)
    rounding = _ROUNDINGS * float(np.finfo(batch.dtype).eps) * float(np.abs(expected).max(initial=0.0))
    spread = float(np.ptp(expected, axis=0).max(initial=0.0))
    error = float(np.abs(batch - expected).max(initial=0.0))
    return spread > _LEAST_SPREAD * rounding and error <= max(rounding, _SHARE_OF_SPREAD * spread)


def _keep_one_image(model: ir.Model, image: ir.Value, shapes: Mapping[ir.Value, Shape]) -> bool:
    """Keep the axis of the one image where a Squeeze removes every axis of length 1.

    Returns:
        Whether there are such nodes; they stay as they are if the file's outputs would be others.
    """
    squeezing = [
        (node, shapes[node.inputs[0]])
        for node in model.graph
        if node.op_type == "Squeeze" and node.inputs[0] is not None and not any(node.inputs[1:])
    ]
    squeezing = [(node, lengths) for node, lengths in squeezing if lengths[:1] == (1,)]
    if not squeezing:
        return False
    feeds = {str(image.name): noise_for(image, shapes[image])}
    expected = open_graph(model).run(None, feeds)
    for node, lengths in squeezing:
        name_axes(node, [axis for axis, length in enumerate(lengths) if axis and length == 1], model.graph)
    try:
        found = open_graph(model).run(None, feeds)
    # onnxruntime has an exception class for each of its status codes.
    except Exception:
        found = []
    if [array.ravel().tolist() for array in found] == [array.ravel().tolist() for array in expected]:
        return True
    for node, _lengths in squeezing:
        node.resize_inputs(1)
    return False
