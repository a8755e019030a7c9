"""The explaining graph: a network, the backward pass of its tail and the map, in one ONNX graph for any runtime."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.differentiate import Backward, differentiate
from heatlens_server.backends.onnx.gradient.find import FoundLayer
from heatlens_server.backends.onnx.gradient.tape import Known, NotDifferentiable, Tape
from heatlens_server.backends.onnx.graph_array import GraphArray, Length, write_map
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, GraphSpec, InputKind, Output
from heatlens_server.core.grid import Layout
from heatlens_server.core.methods import Method
from heatlens_server.core.tasks import Activation, Task
from heatlens_server.maps.precision import FP16_GRADIENT_SCALE
from heatlens_server.maps.targets import resolve, seeds

_FLOAT = ir.DataType.FLOAT
_INT64 = ir.DataType.INT64

Sizes = tuple[int | str, ...]


def explaining_model(loaded: LoadedFile, spec: GraphSpec) -> ir.Model:
    """Write a network's explaining graph.

    Args:
        loaded: a classifier.
        spec: which graph; its layer is one of the network's.

    Returns:
        A model with the inputs `image` (N, C, H, W) and `class_index` (N, K), and the outputs of `spec`. N is 1 for a
        network that takes one image at a time.

    Raises:
        NotDifferentiable: an operator of the tail has no rule, or a value that the backward pass reads cannot be
            repeated for several classes.
    """
    return _Writer(loaded, spec).model()


class _Writer:
    """Writes one graph around a copy of a network's."""

    def __init__(self, loaded: LoadedFile, spec: GraphSpec) -> None:
        self._loaded, self._spec = loaded, spec
        self._model = loaded.model.clone()
        graph = self._model.graph
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        self._values = {value.name: value for value in values}
        known = loaded.known
        self._known = Known(
            {self._values[v.name]: shape for v, shape in known.shapes.items() if v.name in self._values},
            {self._values[v.name]: array for v, array in known.constants.items() if v.name in self._values},
            known.dtype,
            known.opset,
        )
        # Of one score, whose two classes have -z and z.
        self._is_binary = loaded.info.task is Task.BINARY and loaded.scores.class_count == 1
        self._is_half = known.dtype is ir.DataType.FLOAT16
        self._tape = Tape(self._known, lambda _value: False, prefix="explain")
        self._nodes = list(graph)
        classes: int | str = "classes" if spec.classes is None else spec.classes
        # Any number of images would be run, and mixed without a word.
        self._images: int | str = "batch" if loaded.info.takes_batches else 1
        self._class_index = _typed(ir.Value(name=CLASS_INDEX), _INT64, (self._images, classes))
        self._classes = classes

    def model(self) -> ir.Model:
        """The whole."""
        loaded, spec, tape = self._loaded, self._spec, self._tape
        names = [layer.name for layer in loaded.info.layers]
        layer = loaded.found_layers[names.index(spec.layer)]
        image, given = self._image()
        scores = self._values[loaded.scores.value.name]
        logits = self._logits(scores)
        images = Length(logits, 0)
        count = Length(self._class_index, 1) if spec.classes is None else spec.classes
        wanted = GraphArray(self._class_index, (images, count), _INT64, tape)
        as_array = GraphArray(logits, (images, loaded.info.class_count), _FLOAT, tape)
        ids = resolve(as_array, wanted)
        activations = self._as_map(self._float(self._values[layer.value.name]), layer)
        found = {Output.LOGITS: logits, Output.CLASS_ID: ids.value, Output.ACTIVATIONS: activations}
        factors = ids.value
        if Output.GRADIENTS in spec.outputs or not spec.method.traits.class_free:
            rows = self._seed(as_array, ids, scores)
            factors = found[Output.GRADIENTS] = self._gradients(scores, layer, rows)
        if spec.method is Method.CAM:
            # Of a linear head over means: its weights are the gradients' sums over places.
            factors = tape.sum(factors, (-2, -1), keepdims=False)
        size = (layer.channels, layer.height, layer.width)
        maps = write_map(tape, spec.method, activations, factors, shape=size, classes=spec.classes)
        found |= dict(zip((Output.CAM, Output.CAM_SCALE, Output.CAM_OFFSET), maps, strict=True))
        return self._finished(image, given, found, size)

    def _image(self) -> tuple[ir.Value, list[ir.Node]]:
        """The input, and the nodes that make the network's own input of it."""
        loaded, known = self._loaded, self._known
        tape = Tape(known, lambda _value: False, prefix="image")
        own = self._values[loaded.image.value.name]
        preprocess = loaded.info.preprocess
        is_bytes = self._spec.input is InputKind.UINT8
        dtype = ir.DataType.UINT8 if is_bytes else _FLOAT
        image = _typed(ir.Value(name=IMAGE), dtype, (self._images, preprocess.channels, *preprocess.input_px))
        wanted = own.dtype or _FLOAT
        at = image
        if is_bytes and wanted is not ir.DataType.UINT8:
            shape = (1, preprocess.channels, 1, 1)
            at = tape.op("Cast", at, to=int(_FLOAT))
            at = tape.op("Mul", at, tape.constant(np.reshape(preprocess.gains, shape), np.float32))
            at = tape.op("Add", at, tape.constant(np.reshape(preprocess.biases, shape), np.float32))
        elif not is_bytes and wanted is ir.DataType.UINT8:
            at = tape.op("Round", at)
        if loaded.info.channels_last:
            at = tape.op("Transpose", at, perm=[0, 2, 3, 1])
        if wanted is not (_FLOAT if at is not image else dtype):
            at = tape.op("Cast", at, to=int(wanted))
        own.replace_all_uses_with(at)
        self._model.graph.inputs.remove(own)
        for value in tape.initializers:
            self._model.graph.register_initializer(value)
        return image, tape.nodes

    def _logits(self, scores: ir.Value) -> ir.Value:
        """(N, classes), float32."""
        flat = self._tape.op("Reshape", self._float(scores), self._tape.ints(-1, self._loaded.scores.class_count))
        if self._is_binary:
            return self._tape.op("Concat", self._tape.op("Neg", flat), flat, axis=1)
        return flat

    def _seed(self, logits: GraphArray, ids: GraphArray, scores: ir.Value) -> ir.Value:
        """The derivative of every class's score by the network's, one row for each image and class."""
        tape = self._tape
        sigmoid = self._loaded.info.task.traits.activation is Activation.SIGMOID
        found: GraphArray = seeds(logits, ids, self._spec.score, sigmoid=sigmoid)
        seed = found.value
        if self._is_binary:
            first, second = tape.ops("Split", [seed], 2, axis=2, num_outputs=2)
            seed = tape.op("Sub", second, first)
        rows = tape.op("Reshape", seed, tape.ints(-1, *self._known.shapes[scores][1:]))
        if self._is_half:
            rows = tape.op("Mul", rows, tape.constant(FP16_GRADIENT_SCALE, np.float32))
        return rows if self._known.dtype is _FLOAT else tape.cast(rows)

    def _gradients(self, scores: ir.Value, layer: FoundLayer, rows: ir.Value) -> ir.Value:
        """(N, K, C, h, w), float32."""
        tape, value = self._tape, self._values[layer.value.name]
        backward = differentiate(self._nodes, {scores: rows}, [value], self._known)
        gradient = backward.gradients[value]
        if gradient is None:
            raise NotDifferentiable(f"the scores do not depend on {layer.value.name!r}")
        if self._spec.classes != 1:
            self._repeat(backward)
        tape.nodes.extend(backward.nodes)
        for constant in backward.initializers:
            self._model.graph.register_initializer(constant)
        maps = self._as_map(self._float(gradient), layer)
        if self._is_half:
            maps = tape.op("Div", maps, tape.constant(FP16_GRADIENT_SCALE, np.float32))
        size = (layer.channels, layer.height, layer.width)
        if self._spec.classes is not None:
            return tape.op("Reshape", maps, tape.ints(-1, self._spec.classes, *size))
        shape = tape.op("Concat", tape.op("Shape", self._class_index), tape.ints(*size), axis=0)
        return tape.op("Reshape", maps, shape)

    def _repeat(self, backward: Backward) -> None:
        """Give the backward pass a row for each image and class of what it reads of the forward pass."""
        own = {output for node in backward.nodes for output in node.outputs}
        repeated: dict[ir.Value, ir.Value] = {}
        for node in backward.nodes:
            for place, value in enumerate(node.inputs):
                shape = () if value is None else self._known.shapes.get(value, ())
                if value is None or value in own or min(shape, default=0) >= 0:
                    continue
                if value not in repeated:
                    repeated[value] = self._repeated(value, shape)
                node.replace_input_with(place, repeated[value])

    def _repeated(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        tape = self._tape
        axes = [axis for axis, length in enumerate(shape) if length < 0]
        if len(axes) != 1:
            raise NotDifferentiable(f"{value.name!r} holds the images on several axes: export it for 1 class")
        multiple = -shape[axes[0]]
        numbers = tape.op("Shape", self._class_index)
        count = tape.op("Squeeze", tape.op("Shape", self._class_index, start=0, end=1))
        images = tape.op("Range", tape.constant(0, np.int64), count, tape.constant(1, np.int64))
        rows = tape.op("Expand", tape.op("Unsqueeze", images, tape.ints(1)), numbers)
        rows = tape.op("Reshape", rows, tape.ints(-1, 1))
        # An image may take several places of the axis, as the windows of one do.
        within = tape.constant(np.arange(multiple)[None], np.int64)
        places = tape.op("Add", tape.op("Mul", rows, tape.constant(multiple, np.int64)), within)
        return tape.op("Gather", value, tape.op("Reshape", places, tape.ints(-1)), axis=axes[0])

    def _float(self, value: ir.Value) -> ir.Value:
        return value if self._known.dtype is _FLOAT else self._tape.op("Cast", value, to=int(_FLOAT))

    def _as_map(self, value: ir.Value, layer: FoundLayer) -> ir.Value:
        """A layer's output, or a gradient by it, as a map (rows, C, h, w)."""
        tape, grid = self._tape, layer.grid
        if grid.layout is Layout.CHANNELS_LAST:
            return tape.op("Transpose", value, perm=[0, 3, 1, 2])
        if grid.layout is not Layout.TOKENS:
            return value
        if grid.prefix:
            end = grid.prefix + grid.height * grid.width
            value = tape.op("Slice", value, tape.ints(grid.prefix), tape.ints(end), tape.ints(1))
        turned = tape.op("Transpose", value, perm=[0, 2, 1])
        return tape.op("Reshape", turned, tape.ints(-1, layer.channels, grid.height, grid.width))

    def _finished(
        self, image: ir.Value, given: list[ir.Node], found: Mapping[Output, ir.Value], size: tuple[int, int, int]
    ) -> ir.Model:
        graph, rows = self._model.graph, (self._images, self._classes)
        shapes: Mapping[Output, Sizes] = {
            Output.LOGITS: (self._images, self._loaded.info.class_count),
            Output.CLASS_ID: rows,
            Output.ACTIVATIONS: (self._images, *size),
            Output.GRADIENTS: (*rows, *size),
            Output.CAM: (*rows, *size[1:]),
            Output.CAM_SCALE: rows,
            Output.CAM_OFFSET: rows,
        }
        returned = []
        for output in self._spec.outputs:
            node = ir.node("Identity", [found[output]])
            dtype = _INT64 if output is Output.CLASS_ID else _FLOAT
            returned.append(_typed(node.outputs[0], dtype, shapes[output]))
            # A tensor of the file may have the name already.
            if (taken := self._values.get(str(output))) is not None:
                taken.name = f"{output} of the file"
            node.outputs[0].name = str(output)
            self._tape.nodes.append(node)
        graph.extend([*given, *self._tape.nodes])
        for value in self._tape.initializers:
            graph.register_initializer(value)
        graph.inputs[:] = [image, self._class_index]
        graph.outputs[:] = returned
        common.TopologicalSortPass()(self._model)
        common.RemoveUnusedNodesPass()(self._model)
        return self._model


def _typed(value: ir.Value, dtype: ir.DataType, shape: Sizes) -> ir.Value:
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    return value
