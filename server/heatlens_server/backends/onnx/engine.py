"""The onnxruntime engine: runs exported graphs, which differentiate themselves. It never imports torch."""

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.capabilities import can_serve, check_served, check_tensors, served_info
from heatlens_server.backends.onnx.cuda import open_graphed
from heatlens_server.backends.onnx.graph_bytes import taking_floats
from heatlens_server.backends.onnx.graph_rows import (
    GraphRows,
    Int64Array,
    explain_batch,
    normalisation_table,
    normalised_planes,
    planes,
)
from heatlens_server.backends.onnx.manifest import Manifest
from heatlens_server.backends.onnx.map_finish import Maps
from heatlens_server.backends.onnx.providers import (
    CUDA,
    choose_for,
    is_out_of_memory,
    load_runtime,
    open_session,
    session_options,
)
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, SERVED_OUTPUTS, Format, InputKind
from heatlens_server.core.methods import RANKED, Method
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, class_targets

_log = logging.getLogger(__name__)

_Runner = Callable[[Mapping[str, npt.NDArray[Any]]], list[npt.NDArray[Any]]]

# A session holds the weights once more, laid out for its kernels: as many are kept as fit in this, within limits.
_SESSIONS_BYTES = 1 << 30
_FEWEST_SESSIONS = 2
_MOST_SESSIONS = 16

# Of a layer and method, the pixels' type: what the graph takes, or float32 in its place.
_RunnerKey = tuple[str, Method, str]
_UINT8 = "uint8"

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"

# What images may be, as onnxruntime and as numpy call it.
_DTYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}


class OnnxRuntimeEngine:
    """Explains with the graphs of an export, on a CPU or an NVIDIA GPU. Implements `core.engine.Engine`."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        device: str = "auto",
        provider: str = "auto",
        threads: int | None = None,
    ) -> None:
        """Open the default graph's session; other layers' and methods' are opened when they are first asked for.

        Args:
            folder: of the export.
            manifest: of the export, from `read_manifest`.
            device: "auto", "cpu", "cuda" or "cuda:N".
            provider: "auto", "cpu", "cuda" or "tensorrt".
            threads: for one run on a CPU; None for as many as there are cores for this process.

        Raises:
            ModelLoadError: the export is not one for this engine or cannot be loaded, onnxruntime is not installed
                as it should be, or the device or provider asked for is missing.
        """
        check_served(manifest, Format.ONNX, SERVED_OUTPUTS)
        self._runtime = load_runtime()
        self._folder = folder
        self._manifest = manifest
        self._graphs = {(graph.layer, graph.method): graph.file for graph in manifest.graphs}
        self._table = normalisation_table(manifest.preprocess) if manifest.input is InputKind.FLOAT else None
        self._options = session_options(self._runtime, threads=threads)
        # Where graphs that are opened from memory find their weights.
        self._options.add_session_config_entry(_WEIGHTS_FOLDER, os.fspath(folder))
        cache = folder / "tensorrt" if os.access(folder, os.W_OK) else None
        self._choice = choose_for(
            self._runtime, device=device, provider=provider, precision=manifest.precision, cache=cache
        )
        self._runners: OrderedDict[_RunnerKey, _Runner] = OrderedDict()
        self._most_runners = _session_count(folder, manifest)
        self._lock = Lock()
        default = manifest.graphs[0]
        try:
            self._runner(default.layer, default.method, _UINT8)
        except ModelLoadError:
            raise
        # onnxruntime has an exception class for each of its status codes, and paths in their messages.
        except Exception as error:
            _log.exception("onnxruntime cannot load a graph")
            raise ModelLoadError(
                f"onnxruntime cannot load the graph of layer {default.layer!r} ({type(error).__name__})"
            ) from error
        self._info = served_info(manifest, engine_name="onnxruntime", device=self._choice.device)

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
        try:
            # Of graphs that normalise, there is another one for float32 pixels.
            dtype = _UINT8 if self._table is not None else images.dtype.name
            runs = [partial(self._run, self._runner(layer, spec.method, dtype)) for layer in spec.layers]
            size = (images.shape[1], images.shape[2]) if spec.upsample else None
            return explain_batch(
                runs,
                images,
                class_targets(targets),
                classes=self._manifest.classes,
                size=size,
                aggregation=spec.aggregation,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from None
            raise

    def close(self) -> None:
        """Let go of every session. Idempotent."""
        with self._lock:
            self._graphs.clear()
            self._runners.clear()

    def _run(self, runner: _Runner, images: ImageArray, class_index: Int64Array) -> GraphRows:
        if self._table is None:
            image = planes(images)
        else:
            image = normalised_planes(images, self._manifest.preprocess, self._table)
        logits, class_ids, values, scales, offsets = runner({IMAGE: image, CLASS_INDEX: class_index})
        return GraphRows(logits, class_ids, Maps(values, scales, offsets))

    def _runner(self, layer: str, method: Method, dtype: str) -> _Runner:
        """What runs the graph of a layer and method on pixels of a type: made now, or kept from before."""
        key = (layer, method, dtype)
        with self._lock:
            runner = self._runners.get(key)
            if runner is None:
                if (layer, method) not in self._graphs:
                    raise ValueError(f"the export has no graph for layer {layer!r} and method {method}")
                runner = self._runners[key] = self._open(self._folder / self._graphs[layer, method], dtype)
                if len(self._runners) > self._most_runners:
                    self._runners.popitem(last=False)
            self._runners.move_to_end(key)
            return runner

    def _open(self, file: Path, dtype: str) -> _Runner:
        # A graph that normalises pixels first casts them, of whatever type they are.
        graph = file if dtype == _UINT8 else taking_floats(file.read_bytes(), IMAGE)
        outputs = list(SERVED_OUTPUTS)
        if self._choice.name == CUDA:
            probe = self._probe(dtype)
            graphed = open_graphed(self._runtime, graph, self._options, self._choice, outputs=outputs, probe=probe)
            if graphed is not None:
                return graphed.run
        session, self._choice = open_session(self._runtime, graph, self._options, self._choice)
        tensors = {tensor.name: tensor for tensor in (*session.get_inputs(), *session.get_outputs())}
        image_dtype = _DTYPES.get(tensors[IMAGE].type, tensors[IMAGE].type) if IMAGE in tensors else "no"
        if dtype == _UINT8:
            check_tensors(self._manifest, {name: tensor.shape for name, tensor in tensors.items()}, image_dtype)
        return partial(session.run, outputs)

    def _probe(self, dtype: str) -> dict[str, npt.NDArray[Any]]:
        """Inputs of one row."""
        shape = (1, self._manifest.preprocess.channels, *self._manifest.preprocess.input_px)
        image = np.zeros(shape, dtype if self._table is None else np.float32)
        return {IMAGE: image, CLASS_INDEX: np.full((1, self._manifest.classes or 1), RANKED, np.int64)}


def _session_count(folder: Path, manifest: Manifest) -> int:
    weights_bytes = sum((folder / name).stat().st_size for name in manifest.files)
    return max(_FEWEST_SESSIONS, min(_MOST_SESSIONS, _SESSIONS_BYTES // max(weights_bytes, 1)))
