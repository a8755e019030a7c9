"""The TorchScript engine: runs exported modules, which return activations and gradients; the map is made in torch."""

import copy
import logging
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor

from heatlens_server.backends.onnx.capabilities import can_serve, check_served, served_info
from heatlens_server.backends.onnx.graph_rows import (
    GraphRows,
    Int64Array,
    explain_batch,
    normalisation_table,
    normalised_planes,
)
from heatlens_server.backends.onnx.manifest import GraphFile, Manifest, sha256_of
from heatlens_server.backends.onnx.map_finish import Maps
from heatlens_server.backends.torch.cam.saliency import saliency
from heatlens_server.backends.torch.network.device import memory_errors, resolve_device, run_on_threads
from heatlens_server.core.arrays import Float32Array, ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import ModelFilesChanged, ModelLoadError
from heatlens_server.core.graph_spec import Format, InputKind, Output
from heatlens_server.core.methods import RANKED, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, class_targets
from heatlens_server.maps.methods import raw_map

_log = logging.getLogger(__name__)

_NEEDED = (Output.LOGITS, Output.CLASS_ID, Output.ACTIVATIONS)

# Filters of warnings are the process's: two threads that change them at once may leave one's behind.
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A module and the layout of the images that it takes."""

    module: torch.jit.ScriptModule
    layout: torch.memory_format


class TorchScriptEngine:
    """Explains with the modules of an export, on a CPU or a CUDA device. Implements `core.engine.Engine`.

    One module per layer serves every method: the method's maths is applied to what the module returns.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, device: str = "auto") -> None:
        """Load the default layer's module; other layers' are loaded when they are first asked for.

        Args:
            folder: of the export.
            manifest: of the export, from `read_manifest`.
            device: "auto", "cpu", "cuda" or "cuda:N".

        Raises:
            ModelLoadError: the export is not one for this engine, cannot be loaded or does not run, or there is no
                such device.
        """
        alone = all(graph.method.traits.class_free for graph in manifest.graphs)
        check_served(manifest, Format.TORCHSCRIPT, _NEEDED if alone else (*_NEEDED, Output.GRADIENTS))
        self._device = resolve_device(device)
        self._manifest = manifest
        self._graphs = {(graph.layer, graph.method): graph for graph in manifest.graphs}
        self._table = normalisation_table(manifest.preprocess) if manifest.input is InputKind.FLOAT else None
        self._folder = folder
        self._modules: dict[str, _Loaded] = {}
        self._lock = threading.Lock()
        self._threads: int | None = None
        module = self._loaded(manifest.graphs[0].file).module
        self._info = replace(
            served_info(manifest, engine_name="torchscript", device=str(self._device)),
            weights_bytes=sum(one.nbytes for one in (*module.parameters(), *module.buffers())),
        )

    @property
    def info(self) -> Capabilities:
        """What this engine can do."""
        return self._info

    def can(self, spec: MapSpec) -> bool:
        """Whether the export has what a request needs: `explain` takes no other."""
        return can_serve(self._manifest, spec)

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            MemoryError: the device is out of memory.
            ValueError: the export has no graph for the method and layer.
        """
        runs = [partial(self._run, self._graph(layer, spec.method)) for layer in spec.layers]
        size = (images.shape[1], images.shape[2]) if spec.upsample else None
        run_on_threads(self._threads)
        with memory_errors():
            return explain_batch(
                runs,
                images,
                class_targets(targets),
                classes=self._manifest.classes,
                size=size,
                aggregation=spec.aggregation,
            )

    def use_threads(self, count: int | None) -> None:
        """Run on so many threads of a CPU from now on."""
        self._threads = count

    def another(self) -> Self:
        """An engine for another thread; the two have the same modules, which may be run at once."""
        return copy.copy(self)

    def close(self) -> None:
        """Let go of the modules. Idempotent."""
        with self._lock:
            # Others may have the same ones.
            self._graphs, self._modules = {}, {}

    @torch.inference_mode()
    def _run(self, graph: GraphFile, images: ImageArray, class_index: Int64Array) -> GraphRows:
        index = torch.from_numpy(class_index).to(self._device)
        loaded = self._loaded(graph.file)
        returned = loaded.module(self._image(images).contiguous(memory_format=loaded.layout), index)
        outputs = dict(zip(graph.outputs, returned, strict=True))
        if graph.method.traits.class_free:
            factors = outputs[Output.CLASS_ID]
        elif graph.method is Method.CAM:
            # Offered behind global average pooling and one linear layer only, whose weights these sums are.
            factors = outputs[Output.GRADIENTS].sum((-2, -1))
        else:
            factors = outputs[Output.GRADIENTS]
        maps = saliency([raw_map(graph.method, outputs[Output.ACTIVATIONS], factors)])
        return GraphRows(
            logits=_array(outputs[Output.LOGITS]),
            class_ids=outputs[Output.CLASS_ID].cpu().numpy(),
            maps=Maps(_array(maps.values), _array(maps.scale), _array(maps.offset)),
        )

    def _image(self, images: ImageArray) -> Tensor:
        """(N, C, H, W) on the device; where the graph normalises, it comes in channels_last."""
        if self._table is None:
            return torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        return torch.from_numpy(normalised_planes(images, self._manifest.preprocess, self._table)).to(self._device)

    def _graph(self, layer: str, method: Method) -> GraphFile:
        graph = self._graphs.get((layer, method))
        if graph is None:
            raise ValueError(f"the export has no graph for layer {layer!r} and method {method}")
        return graph

    def _loaded(self, file: str) -> _Loaded:
        """A file's module: loaded now, or kept from before.

        Raises:
            ModelFilesChanged: the file was overwritten since the first was loaded.
        """
        with self._lock:
            if file not in self._modules:
                if self._modules and sha256_of(self._folder / file) != self._manifest.files[file]:
                    raise ModelFilesChanged(file)
                module = self._load(self._folder / file)
                self._modules[file] = _Loaded(module, self._find_layout(file, module))
            return self._modules[file]

    @torch.inference_mode()
    def _find_layout(self, file: str, module: torch.jit.ScriptModule) -> torch.memory_format:
        """The layout that a module runs in: channels_last, in which convolutions are fastest, or else contiguous.

        A view that was recorded on contiguous tensors may be impossible on others.
        """
        # Tensors of one row are in both layouts at once.
        images = np.zeros((2, *self._manifest.preprocess.input_px, self._manifest.preprocess.channels), np.uint8)
        index = torch.full((2, self._manifest.classes or 1), RANKED, device=self._device)
        image = self._image(images)
        try:
            module(image.contiguous(memory_format=torch.channels_last), index)
        except RuntimeError as error:
            _log.info("%s does not run in channels_last", file, exc_info=error)
        else:
            return torch.channels_last
        try:
            module(image.contiguous(), index)
        except RuntimeError as error:
            _log.exception("%s does not run", file)
            raise ModelLoadError(f"{file} does not run on {self._device}") from error
        return torch.contiguous_format

    def _load(self, path: Path) -> torch.jit.ScriptModule:
        with _loading, warnings.catch_warnings():
            # TorchScript is deprecated, and wanted all the same. A DeprecationWarning from Python 3.14 on.
            for category in (FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is (deprecated|not supported)", category)
            try:
                module: torch.jit.ScriptModule = torch.jit.load(path, map_location=self._device)  # type: ignore[no-untyped-call]
            # Damaged files raise all sorts, with paths in their messages.
            except Exception as error:
                raise ModelLoadError(f"{path.name} cannot be loaded as TorchScript ({type(error).__name__})") from error
        return module


def _array(tensor: Tensor) -> Float32Array:
    array: Float32Array = tensor.float().cpu().numpy()
    return array
