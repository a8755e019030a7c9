"""What is known about the values of a graph: shapes in which the batch is any, and constants.

Inference knows them all for most convolutional networks. Where it does not, the file is run on one image and on two.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx.shape_inference
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.file import skeleton_of
from heatlens_server.backends.onnx.gradient.tape import BATCH, Array, Known, Shape
from heatlens_server.backends.onnx.packed import OpenGraph, PackedGraph, open_packed
from heatlens_server.backends.onnx.providers import load_runtime
from heatlens_server.core.errors import ModelLoadError

_MOST_CONSTANT_ELEMENTS = 1 << 16
_BATCH_NAME = "batch of images"
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


def know(model: ir.Model, image: ir.Value, shape: Sequence[int]) -> Known:
    """Find the shape of every value, and which integers are the same for every image.

    Args:
        model: from `read_file`. Computed integers that turn out to be constant become constants of it, and what
            computed them is left out.
        image: its input.
        shape: of one image, without the batch.

    Raises:
        ModelLoadError: the graph cannot be run.
    """
    constants: dict[ir.Value, Array] = {}
    shapes: dict[ir.Value, Shape] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            shapes[value] = tuple(value.const_value.shape.numpy())
            if value.const_value.size <= _MOST_CONSTANT_ELEMENTS:
                constants[value] = value.const_value.numpy()
    inferred = _inferred(model, image, shape)
    if inferred is None:
        one, two = (probe(model, image, (count, *shape)) for count in (1, 2))
        for value, lengths in one[0].items():
            if value in two[0] and len(two[0][value]) == len(lengths):
                pairs = zip(lengths, two[0][value], strict=True)
                # Of one image and of two: what is not the same is a multiple of their number.
                shapes[value] = tuple(length if length == other else -length for length, other in pairs)
        for value, elements in one[1].items():
            if np.array_equal(elements, two[1].get(value, np.empty(0))):
                folded = _fold(model, value, elements)
                constants[folded], shapes[folded] = elements, elements.shape
        common.RemoveUnusedNodesPass()(model)
    else:
        shapes |= inferred
    return Known(shapes, constants, _dtype(image), model.graph.opset_imports[""])


def _fold(model: ir.Model, value: ir.Value, elements: Array) -> ir.Value:
    """Put a constant in the place of a computed value."""
    name = f"{value.name}: constant"
    constant = ir.Value(name=name, const_value=ir.tensor(elements, name=name))
    model.graph.register_initializer(constant)
    value.replace_all_uses_with(constant)
    return constant


def _inferred(model: ir.Model, image: ir.Value, shape: Sequence[int]) -> Mapping[ir.Value, Shape] | None:
    """The shape of every value by inference; None if one is not known, or integers are computed."""
    skeleton, _weights = skeleton_of(model)
    for one in skeleton.graph.input:
        if one.name == image.name:
            one.type.tensor_type.shape.ClearField("dim")
            one.type.tensor_type.shape.dim.add(dim_param=_BATCH_NAME)
            for length in shape:
                one.type.tensor_type.shape.dim.add(dim_value=length)
    # What the file says is of fixed sizes, or of another image's.
    del skeleton.graph.value_info[:]
    for one in skeleton.graph.output:
        one.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True).graph
    types = {one.name: one.type.tensor_type for one in (*inferred.value_info, *inferred.output)}
    shapes: dict[ir.Value, Shape] = {image: (BATCH, *shape)}
    for value in (output for node in model.graph for output in node.outputs):
        if not value.uses() and not value.is_graph_output():
            continue
        found = types.get(str(value.name))
        if found is None or not ir.DataType(found.elem_type).is_floating_point() or not found.HasField("shape"):
            return None
        lengths = tuple(
            dim.dim_value if dim.HasField("dim_value") else BATCH if dim.dim_param == _BATCH_NAME else None
            for dim in found.shape.dim
        )
        known = tuple(length for length in lengths if length is not None)
        if len(known) < len(lengths):
            return None
        shapes[value] = known
    return shapes


def _dtype(image: ir.Value) -> ir.DataType:
    return image.dtype if image.dtype is not None and image.dtype.is_floating_point() else ir.DataType.FLOAT


def probe(
    model: ir.Model, image: ir.Value, shape: Sequence[int]
) -> tuple[Mapping[ir.Value, Shape], Mapping[ir.Value, Array]]:
    """Run a graph on noise.

    Returns:
        The shape of every value, and the elements of those of few integers.
    """
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    copy = model.clone()
    produced = [value for node in copy.graph for value in node.outputs if value.name in values]
    lengths = {str(value.name): ir.Value(name=f"{value.name}: shape") for value in produced}
    copy.graph.extend([ir.node("Shape", [value], outputs=[lengths[str(value.name)]]) for value in produced])
    copy.graph.outputs.clear()
    copy.graph.outputs.extend([*produced, *lengths.values()])
    session = open_graph(copy)
    # Of floating point values the shape alone: all of them together would take much memory.
    integers = [one.name for one in session.get_outputs() if one.name in values and one.type in _INTEGERS]
    asked = [str(value.name) for value in lengths.values()]
    try:
        found = session.run([*asked, *integers], {str(image.name): noise_for(image, shape)})
    # onnxruntime has an exception class for each of its status codes, and paths in their messages.
    except Exception as error:
        raise ModelLoadError(f"the file does not run on an input of {tuple(shape)} ({type(error).__name__})") from error
    shapes = {
        values[name]: tuple(int(length) for length in array)
        for name, array in zip(lengths, found[: len(asked)], strict=True)
    }
    elements = {
        values[name]: np.asarray(array)
        for name, array in zip(integers, found[len(asked) :], strict=True)
        if array.size <= _MOST_CONSTANT_ELEMENTS
    }
    return {**shapes, image: tuple(shape)}, elements


def noise_for(image: ir.Value, shape: Sequence[int]) -> Array:
    """Noise for an input, in [0, 1] or, for one of bytes, in 0 to 255."""
    rng = np.random.default_rng(0)
    if image.dtype is ir.DataType.UINT8:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    noise: Array = rng.random(shape).astype(_dtype(image).numpy())
    return noise
