"""Writing a network as `stored.py` reads it: a server then differentiates nothing, and needs no package onnx."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import NotDifferentiable
from heatlens_server.backends.onnx.gradient.values import pack
from heatlens_server.backends.onnx.graph_bytes import raw_initializers
from heatlens_server.backends.onnx.manifest import NETWORK_FILE
from heatlens_server.backends.onnx.packed import Array, PackedGraph
from heatlens_server.backends.onnx.source.load import LoadedFile
from heatlens_server.backends.onnx.source.split import forward_of, split, tail_of
from heatlens_server.backends.onnx.stored import FORWARD_FILE, WEIGHTS_FILE, backward_file, before_file, tail_file
from heatlens_server.core.methods import Method

_ALIGNED_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """A network's graphs.

    Attributes:
        content: what is to be known about them.
        graphs: by file.
        weights: as `stored.StoredNetwork.weights`.
    """

    content: Mapping[str, Any]
    graphs: Mapping[str, bytes]
    weights: Mapping[str, Array]

    def refusal(self, layer: str) -> str:
        """Why the scores cannot be differentiated by a layer; empty if they can."""
        return next(str(one["refused"]) for one in self.content["layers"] if one["name"] == layer)

    def write(self, folder: Path, *, beside: Path | None = None) -> None:
        """Write all of it into a folder.

        Args:
            folder: to write into.
            beside: a file of the same network in that folder, whose weights need not be written again.
        """
        places: dict[str, dict[str, Any]] = {}
        end = 0
        whole = b"" if beside is None else beside.read_bytes()
        written = raw_initializers(whole)
        with (folder / WEIGHTS_FILE).open("wb") as file:
            for name, array in self.weights.items():
                data = np.ascontiguousarray(array).data.cast("B")
                places[name] = {"dtype": array.dtype.str, "shape": array.shape}
                start, stop = written.get(name, (0, 0))
                if beside is not None and whole[start:stop] == data:
                    places[name] |= {"file": beside.name, "offset": start}
                    continue
                file.write(bytes(-end % _ALIGNED_BYTES))
                end += -end % _ALIGNED_BYTES
                places[name] |= {"file": WEIGHTS_FILE, "offset": end}
                file.write(data)
                end += len(data)
        if not end:
            (folder / WEIGHTS_FILE).unlink()
        for name, graph in self.graphs.items():
            (folder / name).write_bytes(graph)
        content = {**self.content, "weights": places}
        (folder / NETWORK_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def stored(loaded: LoadedFile) -> Stored:
    """Write the passes of a classifier by each of its layers.

    A layer by which the scores cannot be differentiated is there with the reason.
    """
    return _Writer(loaded).stored()


class _Writer:
    """Collects the graphs of a network."""

    def __init__(self, loaded: LoadedFile) -> None:
        self._loaded = loaded
        self._graphs: dict[str, bytes] = {}
        self._weights: dict[str, Array] = {}

    def stored(self) -> Stored:
        """All of it."""
        loaded = self._loaded
        scores, model = loaded.scores.value, loaded.model
        place = {value: number for number, node in enumerate(model.graph) for value in node.outputs}
        tensors = sorted({layer.value for layer in loaded.found_layers}, key=lambda value: -place[value])
        about: dict[ir.Value, dict[str, Any]] = {}
        found: list[ir.Value] = []
        kept: dict[str, None] = {}
        for count, value in enumerate(tensors, 1):
            about[value] = {"count": count, "gradient": "", "kept": (), "bypassing": {}, "refused": ""}
            if Method.GRAD_CAM in loaded.info.refusals:
                about[value]["bypassing"] = self._tail(value, count)
                continue
            try:
                passes = split(model, loaded.known, loaded.image.value, [scores], [*found, value])
            except NotDifferentiable as error:
                about[value]["refused"] = str(error)
                continue
            found.append(value)
            if passes.backward is not None:
                self._keep(backward_file(count), passes.backward)
            about[value] |= {"gradient": passes.gradients[str(value.name)], "kept": passes.kept}
            about[value]["bypassing"] = self._tail(value, count)
            kept |= dict.fromkeys(passes.kept)
        by_name = {str(value.name): value for value in place}
        returned = [scores, *tensors, *(by_name[name] for name in kept if name in by_name)]
        self._keep(FORWARD_FILE, pack(forward_of(model, returned)))
        layers = [
            {
                **about[one.value],
                "name": layer.name,
                "output": str(one.value.name),
                "grid": asdict(layer.grid),
                "channels": layer.channels,
                "height": layer.height,
                "width": layer.width,
            }
            for layer, one in zip(loaded.info.layers, loaded.found_layers, strict=True)
        ]
        info = loaded.info
        content = {
            "image": str(loaded.image.value.name),
            "scores": str(scores.name),
            "seed": f"seed: {scores.name}",
            "channels_last": info.channels_last,
            "dtype": info.dtype,
            "takes_batches": info.takes_batches,
            "has_linear_head": info.has_linear_head,
            "refusals": info.refusals,
            "layers": layers,
        }
        return Stored(content, self._graphs, self._weights)

    def _tail(self, value: ir.Value, count: int) -> Mapping[str, int]:
        """Write what comes behind a layer; return what bypasses it."""
        loaded = self._loaded
        tail = tail_of(loaded.model, loaded.known, loaded.image.value, [loaded.scores.value], value)
        self._keep(tail_file(count), tail.graph)
        if tail.before is not None:
            self._keep(before_file(count), tail.before)
        return tail.kept

    def _keep(self, file: str, packed: PackedGraph) -> None:
        self._graphs[file] = _bare(packed.graph)
        own = self._loaded.model.graph.initializers
        for name, array in packed.weights.items():
            # Each backward pass numbers its constants by itself.
            self._weights.setdefault(name if name in own else f"{file}: {name}", array)


def _bare(graph: bytes) -> bytes:
    """A graph without words for people, such as traces of the code that it comes from."""
    proto = onnx.ModelProto.FromString(graph)
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.value_info[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]
    return proto.SerializeToString(deterministic=True)
