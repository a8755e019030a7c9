"""A network as it is stored: graphs that are ready for onnxruntime, weights beside them. Needs no package but numpy.

`source/store.py` writes such a folder. The layers in it are in an order from the scores on. Of the k-th there is a
backward pass by the first k layers, and what comes behind it; the forward pass is one for all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from heatlens_server.backends.onnx.graph_bytes import external_initializers, returning
from heatlens_server.backends.onnx.manifest import NETWORK_FILE, Manifest
from heatlens_server.backends.onnx.network import NetworkInfo, NetworkLayer
from heatlens_server.backends.onnx.packed import Array, PackedGraph
from heatlens_server.backends.onnx.passes import Passes, Tail
from heatlens_server.backends.onnx.shuffle import shuffled
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.tasks import Task

FORWARD_FILE = "forward.onnx"
WEIGHTS_FILE = "weights.bin"


def backward_file(count: int) -> str:
    """The file of the backward pass by the first `count` layers."""
    return f"backward-{count}.onnx"


def tail_file(count: int) -> str:
    """The file of what comes behind the last of the first `count` layers."""
    return f"tail-{count}.onnx"


def before_file(count: int) -> str:
    """The file of what bypasses that layer, if that is not nothing or the image alone."""
    return f"before-{count}.onnx"


@dataclass(frozen=True, slots=True, eq=False)
class StoredNetwork:
    """A network from a folder. Implements `network.NetworkGraphs`.

    Attributes:
        info: what is known about it.
        graphs: files of graphs, by name: what is written to its folder later changes nothing.
        content: what `source/store.py` wrote about them.
        weights: by their names in the graphs. Constants of one graph alone have that behind "FILE: ".
    """

    info: NetworkInfo
    graphs: Mapping[str, bytes]
    content: Mapping[str, Any]
    weights: Mapping[str, Array]

    def passes(self, layers: Sequence[str]) -> Passes:
        """The forward pass, and the backward pass by some layers.

        Raises:
            ModelLoadError: there is none by one of them; says why.
        """
        known = {name: self._layer(name) for name in layers}
        for name, layer in known.items():
            if layer["refused"]:
                raise ModelLoadError(f"layer {name!r} cannot be differentiated: {layer['refused']}")
        deepest = max(known.values(), key=lambda layer: layer["count"])
        outputs = {name: str(layer["output"]) for name, layer in known.items()}
        kept, scores = tuple(deepest["kept"]), str(self.content["scores"])
        gradients = {name: str(layer["gradient"]) for name, layer in known.items() if layer["gradient"]}
        return Passes(
            forward=self._packed(FORWARD_FILE, outputs=(scores, *outputs.values(), *kept)),
            backward=self._packed(backward_file(deepest["count"])) if gradients else None,
            image=str(self.content["image"]),
            scores=(scores,),
            layers=outputs,
            kept=kept,
            seeds={scores: str(self.content["seed"])},
            gradients=gradients,
        )

    def tail(self, layer: str) -> Tail:
        """What comes behind a layer."""
        about = self._layer(layer)
        bypassing, before = about["bypassing"], before_file(about["count"])
        image = str(self.content["image"])
        return Tail(
            graph=self._packed(tail_file(about["count"])),
            layer=str(about["output"]),
            scores=(str(self.content["scores"]),),
            kept=bypassing,
            before=self._packed(before) if bypassing.keys() - {image} else None,
            image=image,
        )

    def twin(self) -> "StoredNetwork":
        """The same network with its weights in another order; not what its backward pass has of its own."""
        own = external_initializers(self.graphs[FORWARD_FILE])
        return replace(self, weights={**self.weights, **shuffled({name: self.weights[name] for name in own})})

    def _layer(self, name: str) -> Mapping[str, Any]:
        layer: Mapping[str, Any] = next(layer for layer in self.content["layers"] if layer["name"] == name)
        return layer

    def _packed(self, file: str, *, outputs: Sequence[str] | None = None) -> PackedGraph:
        graph = self.graphs[file]
        if outputs is not None:
            graph = returning(graph, outputs)
        return PackedGraph(
            graph,
            {
                name: self.weights[name if name in self.weights else f"{file}: {name}"]
                for name in external_initializers(graph)
            },
        )


def read_graphs(folder: Path) -> dict[str, bytes]:
    """The graphs of a stored network, by their files' names. They hold no weights."""
    patterns = (FORWARD_FILE, "backward-*.onnx", "tail-*.onnx", "before-*.onnx")
    return {path.name: path.read_bytes() for pattern in patterns for path in folder.glob(pattern)}


def read_network(folder: Path, manifest: Manifest, *, is_owned: bool = False) -> StoredNetwork:
    """Read a stored network.

    Args:
        folder: of the export.
        manifest: of the export, from `read_manifest`.
        is_owned: whether nobody writes to the folder: weights are then mapped into memory, and read when they are
            needed. What is mapped would change, or be lost, with its file.
    """
    content = json.loads((folder / NETWORK_FILE).read_text(encoding="utf-8"))
    layers = network_layers(content)
    score = manifest.graphs[0].score
    weights = _weights(folder, content["weights"], is_owned=is_owned)
    info = NetworkInfo(
        task=manifest.task or Task.CLASSIFICATION,
        class_count=manifest.class_count,
        layers=tuple(layers[name] for name in manifest.layers),
        preprocess=manifest.preprocess,
        channels_last=content["channels_last"],
        dtype=content["dtype"],
        takes_batches=content["takes_batches"],
        has_linear_head=has_linear_head(content, manifest.layers),
        refusals={Method(name): why for name, why in content["refusals"].items()},
        # Who exports another one wants that.
        score=None if score is Score.LOGIT else score,
        left_out=frozenset(_left_out(manifest)),
        weights_bytes=sum(array.nbytes for array in weights.values()),
    )
    return StoredNetwork(info, read_graphs(folder), content, weights)


def has_linear_head(content: Mapping[str, Any], layers: Sequence[str]) -> bool:
    """Whether a stored network has a linear head over the first of some layers; see `network.NetworkInfo`."""
    return bool(content["has_linear_head"]) and layers[0] == content["layers"][0]["name"]


def network_layers(content: Mapping[str, Any]) -> dict[str, NetworkLayer]:
    """The layers of a stored network, by name."""
    return {
        layer["name"]: NetworkLayer(
            layer["name"],
            Grid(**{**layer["grid"], "layout": Layout(layer["grid"]["layout"])}),
            *(layer[key] for key in ("channels", "height", "width")),
        )
        for layer in content["layers"]
    }


def _weights(folder: Path, places: Mapping[str, Mapping[str, Any]], *, is_owned: bool) -> dict[str, Array]:
    """The weights, from where they are in the folder's files."""
    read = partial(np.memmap, mode="r") if is_owned else np.fromfile
    data = {file: read(folder / file, dtype=np.uint8) for file in {place["file"] for place in places.values()}}
    weights = {}
    for name, place in places.items():
        count = int(np.prod(place["shape"], dtype=np.int64))
        array = np.frombuffer(data[place["file"]], place["dtype"], count, place["offset"]).reshape(place["shape"])
        # Anywhere in an ONNX file, they may lie at odd addresses.
        weights[name] = array if array.flags.aligned else array.copy()
    return weights


def _left_out(manifest: Manifest) -> Iterator[tuple[str, Method]]:
    """What verification found wrong; and where gradients are, what takes them and was not tried."""
    tried = {(graph.layer, graph.method) for graph in manifest.graphs}
    for entry in manifest.left_out:
        yield entry.layer, entry.method
        if entry.method.traits.needs_gradient:
            untried = (method for method in Method if method.traits.needs_gradient)
            yield from ((entry.layer, method) for method in untried if (entry.layer, method) not in tried)
