"""From an ONNX file to a network that can be explained: what its tensors are, and how sure that is."""

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.file import read_file
from heatlens_server.backends.onnx.gradient.find import (
    FoundLayer,
    ImageInput,
    Scores,
    find_candidates,
    find_image,
    find_layers,
    find_scores,
    has_linear_head,
    layer_of,
)
from heatlens_server.backends.onnx.gradient.tape import Known, NotDifferentiable
from heatlens_server.backends.onnx.gradient.values import know
from heatlens_server.backends.onnx.network import NetworkInfo, NetworkLayer
from heatlens_server.backends.onnx.passes import Passes
from heatlens_server.backends.onnx.source.batch import free_batch, runs_in_batches
from heatlens_server.backends.onnx.source.metadata import read_settings
from heatlens_server.backends.onnx.source.rows import keeps_images_apart
from heatlens_server.backends.onnx.source.split import split
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.tasks import Task

_VERSION_DIGITS = 12
_SIDES = 2
"""The classes of a network of one output."""

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
        scores: its output.
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
        by_name = _values(self.model)
        return split(
            self.model,
            self.known,
            self.image.value,
            [self.scores.value],
            [by_name[name] for name in layers],
            gradients=Method.GRAD_CAM not in self.info.refusals,
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
    settings = read_settings(path, model, image, config)
    height_px, width_px = settings.preprocess.input_px
    shape = image.shape(height_px, width_px)
    takes_batches = free_batch(model, image.value, shape)
    known = know(model, image.value, shape)
    scores = find_scores(model, known, config.output if isinstance(config.output, str) else "")
    if takes_batches and not keeps_images_apart(model, known):
        takes_batches = runs_in_batches(model, image.value, shape, [scores.value])
    refusals: dict[Method, str] = {}
    try:
        layers = find_layers(model, known, image, scores)
    except NotDifferentiable as error:
        reason = str(error)
        refusals = {method: reason for method in Method if method.traits.needs_gradient}
        layers = tuple(find_candidates(model, known, image))[-1:]
    gc.collect()
    if config.layers:
        layers = tuple(_named_layer(model, known, image, name, config) for name in config.layers)
    task, told = _task_of(config, scores, settings.task)
    class_count = _SIDES if task is Task.BINARY else scores.class_count
    labels, about_labels = settings.labels_for(class_count, config)
    info = NetworkInfo(
        task=task,
        class_count=class_count,
        layers=tuple(_network_layer(layer) for layer in layers),
        preprocess=settings.preprocess,
        channels_last=image.channels_last,
        dtype=_dtype(image),
        takes_batches=takes_batches,
        has_linear_head=has_linear_head(known, layers[0], scores),
        refusals=refusals,
    )
    return LoadedFile(
        info=info,
        labels=labels,
        version=_version(path, model),
        assumptions=(*told, *_about_layers(layers, config), *settings.assumptions, *about_labels),
        candidates=tuple(_network_layer(layer) for layer in find_candidates(model, known, image)),
        model=model,
        known=known,
        image=image,
        scores=scores,
    )


def _task_of(config: ModelConfig, scores: Scores, hint: Task | None) -> tuple[Task, tuple[str, ...]]:
    """What the network does, and what is to be said about it."""
    told: list[str] = []
    if scores.activation:
        told.append(
            f"The file's output {scores.output.name!r} is the {scores.activation} of {scores.value.name!r}: maps "
            "explain that tensor's logits; output names another output."
        )
    if config.task != "auto":
        return Task(config.task), tuple(told)
    if hint is not None and hint.traits.has_image_classes:
        told.append(f'What comes with the file makes the task "{hint}"; set task if it is another.')
        return hint, tuple(told)
    if scores.class_count == 1:
        told.append(
            "The file has one output: it is taken as a binary classifier, whose class 1 has the sigmoid of "
            f'{scores.value.name!r}; set task = "regression" if the output is a value.'
        )
        return Task.BINARY, tuple(told)
    if scores.activation == "sigmoid":
        told.append(f'Its sigmoid makes the task "{Task.MULTI_LABEL}"; set task if it is another.')
        return Task.MULTI_LABEL, tuple(told)
    return Task.CLASSIFICATION, tuple(told)


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


def _about_layers(layers: Sequence[FoundLayer], config: ModelConfig) -> tuple[str, ...]:
    if config.layers:
        return ()
    default = layers[0]
    size = f"{default.channels} x {default.height} x {default.width}"
    told = (
        f"Maps explain {default.value.name!r} ({size}), the last tensor of the file on whose places the scores depend"
    )
    return (f"{told}; layers overrides that.",)


def _dtype(image: ImageInput) -> str:
    dtype = image.value.dtype
    return "float32" if dtype is None else str(np.dtype(dtype.numpy()))


def _version(path: Path, model: ir.Model) -> str:
    digest = hashlib.sha256()
    tensors = (value.const_value for value in model.graph.initializers.values())
    beside = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    for one in (path, *sorted(beside)):
        with one.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:_VERSION_DIGITS]
