"""Export one network to ONNX, and judge it in float64."""

import contextlib
import copy
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from bench.coverage.models import inputs, make
from bench.coverage.table import MAX_MAP_DIFFERENCE, compared
from heatlens_server.backends.onnx.graph_network import GraphNetwork
from heatlens_server.backends.onnx.providers import ON_CPU, load_runtime
from heatlens_server.backends.onnx.stored import FORWARD_FILE, read_network
from heatlens_server.backends.torch.cam.grid import Grid, to_map
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.export.network import export_network
from heatlens_server.backends.torch.export.reference import moved_copies
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ExportError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.maps.methods import raw_map
from heatlens_server.maps.steps.job import at_once

# Traced with 2 images and 5 classes.
IMAGES = 3
LARGE_PX, LARGE_PARAMETERS = 300, 60_000_000
"""Networks beyond either are judged on one photo: float64 takes minutes there."""

OFFLOADED_ELEMENTS = 1 << 20

CLASSES = 2
HUGE_PARAMETERS = 500_000_000
"""Networks beyond that are judged on one class: their gradients take more than 20 GB otherwise."""


def measure(source: str) -> dict[str, Any]:
    """Return what the table says about a network."""
    try:
        model = make(source)
        layers = list(dict.fromkeys([model.layers[0], model.layers[len(model.layers) // 2]]))
        rows, nodes, seconds = _judge(model, layers)
    except Exception as error:  # whatever it is belongs in the table
        reason = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
        return {"source": source, "reason": reason.split("\n", maxsplit=1)[0][:200]}
    return {
        "source": source,
        "px": model.preprocess.input_px[0],
        "parameters": _parameter_count(model.module),
        "nodes": nodes,
        "seconds": round(seconds, 1),
        "layers": rows,
    }


def _served(
    model: LoadedModel, layers: Sequence[str], images: np.ndarray, class_ids: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], int, float]:
    """What servers make of a network.

    Returns:
        Logits; maps by each layer; how many nodes the graphs have; the CPU seconds from the network to graphs that are
        open.
    """
    started = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked = dataclasses.replace(model, layers=tuple(layers))
        manifest = export_network(
            asked,
            methods=(Method.GRAD_CAM,),
            precision="fp32",
            source="bench",
            folder=folder,
            report=lambda _line: None,
        )
        graphs = GraphNetwork(read_network(folder, manifest), load_runtime(), ON_CPU, threads=None)
        for layer in layers:
            graphs.has_gradient(layer)
        seconds = time.process_time() - started
        files = (folder / FORWARD_FILE, *folder.glob("backward-*.onnx"))
        nodes = sum(len(onnx.load(file, load_external_data=False).graph.node) for file in files)
        targets = [ClassIds(tuple(row.tolist())) for row in class_ids]
        given = images.astype(np.float32)
        specs = [MapSpec(Method.GRAD_CAM, (layer,), upsample=False) for layer in layers]
        maps = [at_once(graphs.explain(given, targets, spec)).maps(spec, (0, 0)).values for spec in specs]
        (logits,) = graphs.scores(given, tuple(layers[:1])).values()
    return logits, maps, nodes, seconds


def _judge(model: LoadedModel, layers: Sequence[str]) -> tuple[list[dict[str, Any]], int, float]:
    """What is to be said about each layer; the graphs' nodes and seconds."""
    images = inputs(model, 1 if _is_large(model) else IMAGES)
    grids = {layer: model.grid(layer) for layer in layers}
    module = copy.deepcopy(model.module).double()
    with _activations_on_disk(module) if _is_large(model) else contextlib.nullcontext():
        logits, class_ids, float64 = _maps(module, grids, torch.from_numpy(images), None)
    del module
    _, _, float32 = _maps(model.module, grids, torch.from_numpy(images).float(), class_ids)
    found, maps, nodes, seconds = _served(model, layers, images, class_ids)
    rows = _rows(layers, found, maps, logits, float64, [float32])
    if any(max(compared(row), default=0.0) > MAX_MAP_DIFFERENCE for row in rows):
        # Right by luck, or determined? A unit of a ReLU whose sum is zero but for rounding moves the whole map.
        again = [
            _maps(moved, grids, torch.from_numpy(images).float(), class_ids)[2] for moved in moved_copies(model.module)
        ]
        rows = _rows(layers, found, maps, logits, float64, [float32, *again])
    return rows, nodes, seconds


def _rows(
    layers: Sequence[str],
    found: np.ndarray,
    maps: Sequence[np.ndarray],
    logits: np.ndarray,
    float64: Sequence[Any],
    float32: Sequence[Sequence[Any]],
) -> list[dict[str, Any]]:
    rows = []
    for position, (layer, cam) in enumerate(zip(layers, maps, strict=True)):
        expected, gradient, steepness = float64[position]
        rows.append(
            {
                "layer": layer,
                "shape": list(cam.shape[2:]),
                "gradient": gradient,
                "logits": float(np.abs(found - logits).max() / np.abs(logits).max()),
                # Per map, image by image and class by class.
                "steepness": steepness,
                "map": _distance(cam, expected).tolist(),
                "torch": np.max([_distance(run[position][0], expected) for run in float32], axis=0).tolist(),
            }
        )
    return rows


def _distance(maps: np.ndarray, expected: np.ndarray) -> np.ndarray:
    distance: np.ndarray = np.abs(maps - expected).max((-2, -1)).ravel()
    return distance


def _is_large(model: LoadedModel) -> bool:
    return max(model.preprocess.input_px) > LARGE_PX or _parameter_count(model.module) > LARGE_PARAMETERS


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextlib.contextmanager
def _activations_on_disk(module: nn.Module) -> Iterator[None]:
    """Keep what the backward pass needs in files: in float64 the largest networks need more than 20 GB."""
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    counter = itertools.count()
    with tempfile.TemporaryDirectory() as folder:

        def pack(tensor: torch.Tensor) -> torch.Tensor | Path:
            if tensor.numel() < OFFLOADED_ELEMENTS or tensor.data_ptr() in weights:
                return tensor
            path = Path(folder) / f"{next(counter)}.pt"
            torch.save(tensor.detach().clone(), path)
            return path

        def unpack(packed: torch.Tensor | Path) -> torch.Tensor:
            return torch.load(packed) if isinstance(packed, Path) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _recorded(module: nn.Module, layers: Sequence[str], images: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    kept: dict[str, torch.Tensor] = {}

    def keep(layer: str) -> Callable[[nn.Module, object, torch.Tensor], torch.Tensor]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
            kept[layer] = output if output.requires_grad else output.detach().requires_grad_()
            return kept[layer].clone()

        return hook

    handles = [module.get_submodule(layer).register_forward_hook(keep(layer)) for layer in layers]
    with torch.enable_grad():
        logits = module(images)
    for handle in handles:
        handle.remove()
    return logits, kept


def _maps(
    module: nn.Module, grids: Mapping[str, Grid], images: torch.Tensor, class_ids: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, float, list[float]]]]:
    """Return logits, class ids (the most probable if none are given) and what is to be known of each layer.

    That is the maps (N, K, h, w), the largest gradient and, per map, its steepness: by what min-max multiplies the raw
    map's errors, relative to its largest magnitude; 0 for a flat map.
    """
    logits, kept = _recorded(module, list(grids), images)
    if class_ids is None:
        count = 1 if _parameter_count(module) > HUGE_PARAMETERS else CLASSES
        class_ids = np.argsort(-logits.detach().numpy(), axis=1)[:, :count].copy()
    wanted = torch.from_numpy(class_ids)
    by_class = [
        torch.autograd.grad(
            logits.gather(1, wanted[:, k : k + 1]).sum(), [kept[layer] for layer in grids], retain_graph=True
        )
        for k in range(class_ids.shape[1])
    ]
    found = []
    for position, (layer, grid) in enumerate(grids.items()):
        gradients = torch.stack([to_map(of_class[position], grid) for of_class in by_class], dim=1)
        raw = raw_map(Method.GRAD_CAM, to_map(kept[layer].detach(), grid), gradients)
        finished = saliency([raw])
        flat = finished.scale == 0
        steepness = torch.where(flat, 0.0, raw.abs().amax((-2, -1)) / torch.where(flat, 1.0, finished.scale))
        found.append((finished.values.numpy(), float(gradients.abs().max()), steepness.ravel().tolist()))
    return logits.detach().numpy(), class_ids, found
