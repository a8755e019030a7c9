"""Running an exported file as its users will: in its own runtime, from disk, with nothing of ours around it."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, Format, Output
from heatlens_server.core.targets import ClassIds

RunFile = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], Mapping[Output, npt.NDArray[Any]]]
"""Runs a graph on image (N, 3, H, W) and class_index (N, K)."""

_RunInOrder = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], Sequence[npt.NDArray[Any]]]
"""The same; the outputs come in order."""


def open_graph(path: Path, file_format: Format, outputs: Sequence[Output]) -> RunFile:
    """Load an exported graph on the CPU.

    Args:
        path: of the file.
        file_format: of the file.
        outputs: what the graph returns, in order.

    Returns:
        A function that runs it, and raises ExportError if the runtime does.

    Raises:
        ExportError: the runtime is not installed or refuses the file.
    """
    run_in_order = _OPENERS[file_format](path, outputs)

    def run(image: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Mapping[Output, npt.NDArray[Any]]:
        try:
            values = run_in_order(image, class_index)
        # Every runtime has exceptions of its own.
        except Exception as error:
            first_line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
            raise ExportError(
                f"{path.name} does not run on a batch of {len(image)} ({type(error).__name__}: {first_line})"
            ) from error
        return dict(zip(outputs, values, strict=True))

    return run


def running(engine: NetworkEngine, layer: str, file: str) -> RunFile:
    """Run a layer's passes by the engine that serves them, on pixels (N, H, W, C).

    Args:
        engine: of the export.
        layer: which one.
        file: its graph, for errors.

    Returns:
        A function that returns scores, classes, activations and gradients, and raises ExportError if the runtime does.
    """

    def run(pixels: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Mapping[Output, npt.NDArray[Any]]:
        targets = [ClassIds(tuple(row.tolist())) for row in class_index]
        try:
            scores, activations, gradients = engine.factors(pixels, targets, layer)
        except ModelLoadError as error:
            raise ExportError(f"{file}: {error}") from error
        # onnxruntime has an exception class for each of its status codes.
        except Exception as error:
            raise ExportError(
                f"{file}, layer {layer}: it does not run on a batch of {len(pixels)} ({type(error).__name__})"
            ) from error
        (logits,) = scores.values()
        return {
            Output.LOGITS: logits.astype(np.float32),
            Output.CLASS_ID: class_index,
            Output.ACTIVATIONS: activations,
            Output.GRADIENTS: gradients,
        }

    return run


def _open_onnx(path: Path, outputs: Sequence[Output]) -> _RunInOrder:
    try:
        # An extra: exports can be made without it.
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            "an ONNX export is verified in onnxruntime, which is not installed: install heatlens[server] or "
            "heatlens[gpu], or export without verifying"
        ) from error
    options = onnxruntime.SessionOptions()
    # Errors only: advice about the graph is nothing that the reader can follow.
    options.log_severity_level = 3
    # Threads that wait by spinning take the processor from torch's.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A session that lives for a few runs need not plan its memory.
    options.enable_mem_pattern = False
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # onnxruntime has an exception class for each of its status codes, and paths in their messages.
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load {path.name} ({type(error).__name__})") from error

    def run(image: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Sequence[npt.NDArray[Any]]:
        values: Sequence[npt.NDArray[Any]] = session.run(list(outputs), {IMAGE: image, CLASS_INDEX: class_index})
        return values

    return run


def _open_in_torch(
    loader: str, load: Callable[[str], Callable[..., Sequence[Tensor]]], path: Path, _outputs: Sequence[Output]
) -> _RunInOrder:
    # TorchScript warns that it is deprecated, whenever it is used.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = load(str(path))
        except Exception as error:
            raise ExportError(f"{loader} cannot load {path.name} ({type(error).__name__})") from error

    @torch.inference_mode()
    def run(image: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Sequence[npt.NDArray[Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [value.numpy() for value in module(torch.from_numpy(image), torch.from_numpy(class_index))]

    return run


_OPENERS: Mapping[Format, Callable[[Path, Sequence[Output]], _RunInOrder]] = {
    Format.ONNX: _open_onnx,
    Format.TORCHSCRIPT: partial(_open_in_torch, "torch.jit", partial(torch.jit.load, map_location="cpu")),
    Format.PT2: partial(_open_in_torch, "torch.export", lambda path: torch.export.load(path).module()),
}
