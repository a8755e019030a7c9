"""From an ONNX file to a network that can be explained: what its tensors are, and how sure that is."""

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.file import FILE_BESIDE, read_file
from heatlens_server.backends.onnx.gradient.find import (
    FoundLayer,
    ImageInput,
    Scores,
    find_image,
    has_linear_head,
    layer_of,
)
from heatlens_server.backends.onnx.gradient.tape import Known, Shape
from heatlens_server.backends.onnx.gradient.values import know, part_of
from heatlens_server.backends.onnx.network import NetworkInfo, NetworkLayer
from heatlens_server.backends.onnx.passes import Passes, Tail
from heatlens_server.backends.onnx.shuffle import shuffled
from heatlens_server.backends.onnx.source.batch import check_repeats, free_batch, runs_in_batches
from heatlens_server.backends.onnx.source.boxes import cut_suppression
from heatlens_server.backends.onnx.source.layers import choose_layers
from heatlens_server.backends.onnx.source.metadata import FileSettings, read_settings
from heatlens_server.backends.onnx.source.outputs import find_outputs
from heatlens_server.backends.onnx.source.placement import about_placement
from heatlens_server.backends.onnx.source.rows import keeps_images_apart
from heatlens_server.backends.onnx.source.split import split, tail_of
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.tasks import Task

_VERSION_DIGITS = 12

_OF_PLACES = frozenset({Task.SEGMENTATION, Task.DETECTION})
"""Tasks that are about the whole image, at a size that its objects have."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class LoadedFile:
    """A network from a file. Implements `network.NetworkGraphs`.

    Attributes:
        info: what is known about it.
        labels: one per class, or empty.
        version: 12 hex digits of a SHA-256 over the file and what lies beside it.
        assumptions: what was found or assumed, one sentence each, with the key that overrides it.
        candidates: every value that lies on the image like a map, in the order in which they are computed.
        model: the graph.
        known: its shapes.
        image: its input.
        scores: what is explained.
        looked_at: what else is read of it: the boxes of a detector.
        found_layers: those of `info`, in the graph.
    """

    info: NetworkInfo
    labels: tuple[str, ...]
    version: str
    assumptions: tuple[str, ...]
    candidates: tuple[NetworkLayer, ...]
    model: ir.Model
    known: Known
    image: ImageInput
    scores: Scores
    looked_at: tuple[ir.Value, ...]
    found_layers: tuple[FoundLayer, ...]

    @property
    def layer_choices(self) -> tuple[str, ...]:
        """One line for each of `candidates`, with the stage of the network that it is in."""
        sizes = list(dict.fromkeys((layer.height, layer.width) for layer in self.candidates))
        chosen = {layer.name for layer in self.info.layers}
        return tuple(
            f"layer {layer.name!r}: {layer.channels} x {layer.height} x {layer.width}, "
            f"stage {1 + sizes.index((layer.height, layer.width))}{', served' if layer.name in chosen else ''}"
            for layer in self.candidates
        )

    def passes(self, layers: Sequence[str]) -> Passes:
        """The forward pass, and the backward pass by some layers if the network can be differentiated."""
        tensors = {name: self._tensor(name) for name in layers}
        passes = split(
            self.model,
            self.known,
            self.image.value,
            [self.scores.value],
            list(dict.fromkeys(tensors.values())),
            looked_at=self.looked_at,
            gradients=Method.GRAD_CAM not in self.info.refusals,
        )
        names = {layer: str(value.name) for layer, value in tensors.items()}
        gradients = {layer: passes.gradients[name] for layer, name in names.items() if name in passes.gradients}
        return replace(passes, layers=names, gradients=gradients)

    def tail(self, layer: str) -> Tail:
        """What comes behind a layer."""
        scores = [self.scores.value, *self.looked_at]
        return tail_of(self.model, self.known, self.image.value, scores, self._tensor(layer))

    def _tensor(self, layer: str) -> ir.Value:
        """A layer's output; layers of networks that are no files have names of their own."""
        own = dict(zip((one.name for one in self.info.layers), self.found_layers, strict=True))
        return own[layer].value if layer in own else _values(self.model)[layer]

    def twin(self) -> "LoadedFile":
        """The same network with its weights in another order."""
        model = self.model.clone()
        weights = {
            name: value.const_value.numpy()
            for name, value in model.graph.initializers.items()
            # Factors of sizes are no weights.
            if value.const_value is not None and not any(node.op_type == "Resize" for node, _place in value.uses())
        }
        for name, array in shuffled(weights).items():
            model.graph.initializers[name].const_value = ir.Tensor(array, name=name)
        values = {**{str(value.name): value for value in model.graph.inputs}, **_values(model)}
        image = replace(self.image, value=values[str(self.image.value.name)])
        scores = replace(
            self.scores, value=values[str(self.scores.value.name)], output=values[str(self.scores.output.name)]
        )
        known = know(model, image.value, image.shape(*self.info.preprocess.input_px))
        layers = tuple(replace(layer, value=values[str(layer.value.name)]) for layer in self.found_layers)
        looked_at = tuple(values[str(value.name)] for value in self.looked_at)
        return replace(
            self, model=model, known=known, image=image, scores=scores, looked_at=looked_at, found_layers=layers
        )


def load_file(path: Path, config: ModelConfig) -> LoadedFile:
    """Read a file, and find in it what is to be known for explaining it.

    Args:
        path: of the file.
        config: of the model.

    Raises:
        ModelLoadError: it is no such file, or something cannot be found in it; the message names the tensor or the key.
    """
    model = read_file(path)
    # Graphs refer to themselves: what the file was parsed into would stay for a while.
    gc.collect()
    image = find_image(model)
    suppression = cut_suppression(model, config)
    _check_inputs(model, config)
    settings = read_settings(path, model, image, config)
    if config.task != "auto":
        _check_size(settings, Task(config.task))
    shape = image.shape(*settings.preprocess.input_px)
    takes_batches, known = _known(model, image, shape)
    outputs, known = find_outputs(model, known, image, config, settings=settings, suppression=suppression)
    scores, task = outputs.scores, outputs.task
    looked_at = () if outputs.boxes is None else (outputs.boxes,)
    check_repeats(model, image.value, shape, [scores.value, *looked_at])
    if task in _OF_PLACES:
        settings = read_settings(path, model, image, config, is_whole=True)
        _check_size(settings, task)
    if takes_batches and not keeps_images_apart(model, known):
        takes_batches = runs_in_batches(model, image.value, shape, [scores.value, *looked_at])
    chosen = choose_layers(model, known, image, scores, task, are_named=bool(config.layers))
    gc.collect()
    refusals = {method: chosen.why_not for method in Method if method.traits.needs_gradient} if chosen.why_not else {}
    layers = tuple(_named_layer(model, known, image, name, config) for name in config.layers) or chosen.layers
    labels, about_labels = settings.labels_for(outputs.class_count, config)
    about_places = about_placement(model, image, settings.preprocess.input_px, layers[0])
    info = NetworkInfo(
        task=task,
        class_count=outputs.class_count,
        layers=tuple(_network_layer(layer) for layer in layers),
        preprocess=settings.preprocess,
        channels_last=image.channels_last,
        dtype=_dtype(image),
        takes_batches=takes_batches,
        has_linear_head=has_linear_head(known, layers[0], scores),
        detector=outputs.detector,
        threshold=outputs.threshold,
        refusals=refusals,
        weights_bytes=sum(one.const_value.nbytes for one in model.graph.initializers.values() if one.const_value),
    )
    return LoadedFile(
        info=info,
        labels=labels,
        version=_version(path, model),
        assumptions=(
            *outputs.assumptions,
            *(() if config.layers else (chosen.told,)),
            *filter(None, (about_places,)),
            *settings.assumptions,
            *about_labels,
        ),
        candidates=tuple(_network_layer(layer) for layer in chosen.candidates),
        model=model,
        known=known,
        image=image,
        scores=scores,
        found_layers=layers,
        looked_at=looked_at,
    )


def _known(model: ir.Model, image: ImageInput, shape: Shape) -> tuple[bool, Known]:
    """Whether a file takes any number of images, and what is known of its values."""
    takes_batches = free_batch(model, image.value, shape)
    own = image.value.shape
    try:
        return takes_batches, know(model, image.value, shape)
    except ModelLoadError:
        if own is None or isinstance(own[0], int):
            raise
    # It says that it takes any number, and was traced with one: lengths in it are 1.
    image.value.shape = ir.Shape([1, *own[1:]])
    return free_batch(model, image.value, shape), know(model, image.value, shape)


def _check_inputs(model: ir.Model, config: ModelConfig) -> None:
    """Raises ModelLoadError if what is explained takes more than the image."""
    outputs = [value for value in model.graph.outputs if value.producer() is not None]
    outputs = [value for value in outputs if value.name == config.output] or outputs
    if len(model.graph.inputs) > 1 and outputs:
        names = [str(value.name) for value in part_of(model, outputs).graph.inputs if value.uses()]
        if len(names) > 1:
            raise ModelLoadError(f"the file has {len(names)} inputs ({', '.join(names)}): one, the image, is served")


def _check_size(settings: FileSettings, task: Task) -> None:
    if settings.is_size_assumed and task in _OF_PLACES:
        raise ModelLoadError(f"preprocess: the file leaves the size of its input open: {task} needs crop_px")


def _named_layer(model: ir.Model, known: Known, image: ImageInput, name: str, config: ModelConfig) -> FoundLayer:
    value = _values(model).get(name)
    if value is None:
        raise ModelLoadError(f"layers: the file has no tensor {name!r}; check lists those that lie on the image")
    grid = config.grids[name].grid if name in config.grids else None
    found = layer_of(model, known, image, value, grid)
    if found is None:
        shape = known.shapes.get(value, ())
        raise ModelLoadError(
            f"layers: tensor {name!r} of shape {shape} does not lie on the image like a map: set grids"
        )
    return found


def _values(model: ir.Model) -> Mapping[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _network_layer(layer: FoundLayer) -> NetworkLayer:
    return NetworkLayer(str(layer.value.name), layer.grid, layer.channels, layer.height, layer.width)


def _dtype(image: ImageInput) -> str:
    dtype = image.value.dtype
    return "float32" if dtype is None else str(np.dtype(dtype.numpy()))


def _version(path: Path, model: ir.Model) -> str:
    digest = hashlib.sha256()
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    beside = {tensor.meta[FILE_BESIDE] for tensor in tensors if FILE_BESIDE in tensor.meta}
    for one in (path, *sorted(beside)):
        with one.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:_VERSION_DIGITS]
