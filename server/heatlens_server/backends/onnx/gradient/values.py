"""What is known about the values of a graph: shapes in which the batch is any, and constants.

They follow from the graph for most networks. Where they do not, the file is run on noise.
"""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.file import skeleton_of
from heatlens_server.backends.onnx.gradient.inference import MOST_CONSTANT_ELEMENTS, Facts, infer
from heatlens_server.backends.onnx.gradient.tape import BATCH, Array, Known, Shape
from heatlens_server.backends.onnx.packed import OpenGraph, PackedGraph, open_packed
from heatlens_server.backends.onnx.providers import load_runtime
from heatlens_server.core.errors import ModelLoadError

_COUNTS = 2, 3
"""Numbers of images for which shapes are found: what is not the same for both is a multiple of them."""

_INTEGERS = frozenset({"tensor(int64)", "tensor(int32)", "tensor(bool)"})


def pack(model: ir.Model) -> PackedGraph:
    """A model as onnxruntime opens it without its weights being serialised. The model stays as it is."""
    skeleton, weights = skeleton_of(model)
    inputs = [value for value in skeleton.graph.input if value.name not in weights]
    # onnxruntime fails on weights that it has dropped, as nothing reads them.
    read = {name for node in skeleton.graph.node for name in node.input} | {one.name for one in skeleton.graph.output}
    del skeleton.graph.input[:]
    skeleton.graph.input.extend(inputs)
    held = {name: tensor.numpy() for name, tensor in weights.items() if name in read}
    for name, array in held.items():
        # It takes external initialisers where the graph says that there are some.
        placed = skeleton.graph.initializer.add(name=name, dims=array.shape)
        placed.data_type = int(ir.DataType.from_numpy(array.dtype))
        placed.data_location = onnx.TensorProto.EXTERNAL
        placed.external_data.add(key="location", value="weights")
    return PackedGraph(skeleton.SerializeToString(), held)


def open_graph(model: ir.Model) -> OpenGraph:
    """Open a model on the CPU, to run it once or a few times.

    Raises:
        ModelLoadError: onnxruntime does not take it.
    """
    try:
        return open_packed(load_runtime(), pack(model), runs_once=True)[0]
    except ModelLoadError:
        raise
    # onnxruntime has an exception class for each of its status codes, and paths in their messages.
    except Exception as error:
        raise ModelLoadError(f"onnxruntime cannot open the file ({type(error).__name__})") from error


def part_of(model: ir.Model, outputs: Sequence[ir.Value]) -> ir.Model:
    """A model of what computes some values of a graph. The graph stays as it is."""
    copy = model.clone()
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs[:] = [values[value.name] for value in outputs]
    common.RemoveUnusedNodesPass()(copy)
    return copy


def know(model: ir.Model, image: ir.Value, shape: Sequence[int]) -> Known:
    """Find the shape of every value, and what is the same for every image.

    Args:
        model: from `read_file`. Small computed values that turn out to be constant become constants of it, and what
            computed them is left out. Values get their element types.
        image: its input. If that is of a fixed number of images, the first axis of what is computed counts as theirs
            where it is as long.
        shape: of one image, without the batch.

    Raises:
        ModelLoadError: the graph does not fit its input, or is too large; names the operator and the node.
    """
    fixed = image.shape[0] if image.shape is not None else None
    if isinstance(fixed, int):
        facts = facts_of(model, image, (fixed, *shape))
        shapes = {
            value: (BATCH, *lengths[1:])
            if lengths[:1] == (fixed,) and value.const_value is None and value not in facts.elements
            else lengths
            for value, lengths in facts.shapes.items()
        }
        constants = facts.elements
    else:
        facts, more = (facts_of(model, image, (count, *shape)) for count in _COUNTS)
        shapes = {
            value: lengths
            for value, one in facts.shapes.items()
            if value in more.shapes and (lengths := _for_any_count(one, more.shapes[value])) is not None
        }
        constants = {
            value: elements
            for value, elements in facts.elements.items()
            if np.array_equal(elements, more.elements.get(value, np.empty(0)))
        }
    for value, elements in list(constants.items()):
        is_read = any(constants.keys().isdisjoint(node.outputs) for node, _place in value.uses())
        if value.producer() is not None and (is_read or value.is_graph_output()):
            folded = _fold(model, value, elements)
            constants[folded], shapes[folded] = elements, elements.shape
    common.RemoveUnusedNodesPass()(model)
    return Known(shapes, constants, _dtype(image), model.graph.opset_imports[""])


def _for_any_count(one: Shape, other: Shape) -> Shape | None:
    """The shape for any number of images, of those for two numbers of them; None if it does not follow."""
    if len(one) != len(other):
        return None
    lengths = []
    for length, more in zip(one, other, strict=True):
        share, rest = divmod(length, _COUNTS[0])
        if length != more and (rest or share * _COUNTS[1] != more):
            return None
        lengths.append(length if length == more else BATCH * share)
    return tuple(lengths)


def facts_of(model: ir.Model, image: ir.Value, shape: Sequence[int]) -> Facts:
    """What is known about the values of a graph for an input of one shape: inferred, or else found by running it.

    What may be of any size, whatever the input's, is not run, and stays unknown.

    Args:
        model: from `read_file`.
        image: its input.
        shape: of it, with the number of images.

    Raises:
        ModelLoadError: the graph does not fit its input, or is too large; names the operator and the node.
    """
    facts = infer(model, image, tuple(shape))
    asked = facts.unknown - facts.unbounded
    if asked:
        try:
            _probe(model, image, shape, asked, facts)
        except ModelLoadError as error:
            raise ModelLoadError(facts.misfit or str(error)) from error
    return facts


def _fold(model: ir.Model, value: ir.Value, elements: Array) -> ir.Value:
    """Put a constant in the place of a computed value."""
    name = f"{value.name}: constant"
    constant = ir.Value(name=name, const_value=ir.Tensor(elements, name=name))
    model.graph.register_initializer(constant)
    value.replace_all_uses_with(constant)
    return constant


def _dtype(image: ir.Value) -> ir.DataType:
    return image.dtype if image.dtype is not None and image.dtype.is_floating_point() else ir.DataType.FLOAT


def _probe(model: ir.Model, image: ir.Value, shape: Sequence[int], asked: AbstractSet[ir.Value], facts: Facts) -> None:
    """Run a graph on noise, to add the shapes of some values to what is known, and the elements of few integers."""
    values = {str(value.name): value for value in asked}
    copy = model.clone()
    produced = [value for node in copy.graph for value in node.outputs if value.name in values]
    lengths = {str(value.name): ir.Value(name=f"{value.name}: shape") for value in produced}
    copy.graph.extend([ir.node("Shape", [value], outputs=[lengths[str(value.name)]]) for value in produced])
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([*produced, *lengths.values()])
    session = open_graph(copy)
    # Of floating point values the shape alone: all of them together would take much memory.
    integers = [one.name for one in session.get_outputs() if one.name in values and one.type in _INTEGERS]
    names = [str(value.name) for value in lengths.values()]
    try:
        found = session.run([*names, *integers], {str(image.name): noise_for(image, shape)})
    # onnxruntime has an exception class for each of its status codes, and paths in their messages.
    except Exception as error:
        raise ModelLoadError(f"the file does not run on an input of {tuple(shape)} ({type(error).__name__})") from error
    for name, array in zip(lengths, found[: len(names)], strict=True):
        facts.shapes[values[name]] = tuple(int(length) for length in array)
    for name, array in zip(integers, found[len(names) :], strict=True):
        if array.size <= MOST_CONSTANT_ELEMENTS:
            facts.elements[values[name]] = np.asarray(array)


def noise_for(image: ir.Value, shape: Sequence[int], seed: int = 0) -> Array:
    """Noise for an input, in [0, 1] or, for one of bytes, in 0 to 255."""
    rng = np.random.default_rng(seed)
    if image.dtype is ir.DataType.UINT8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    noise: Array = rng.random(shape).astype(_dtype(image).numpy())
    return noise
