"""Running an exported file as its users will: in its own runtime, from disk, with nothing of ours around it."""

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE, Format, Output

Run = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], Mapping[Output, npt.NDArray[Any]]]
"""Runs a graph on image (N, 3, H, W) and class_index (N, K)."""


def open_graph(path: Path, file_format: Format, outputs: Sequence[Output]) -> Run:
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
    run_plain = _openers[file_format](path, outputs)

    def run(image: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Mapping[Output, npt.NDArray[Any]]:
        try:
            values = run_plain(image, class_index)
        # Every runtime has exceptions of its own.
        except Exception as error:
            raise ExportError(
                f"{path.name} does not run on a batch of {len(image)} ({type(error).__name__}: {_first_line(error)})"
            ) from error
        return dict(zip(outputs, values, strict=True))

    return run


_PlainRun = Callable[[npt.NDArray[Any], npt.NDArray[np.int64]], Sequence[npt.NDArray[Any]]]


def _open_onnx(path: Path, outputs: Sequence[Output]) -> _PlainRun:
    try:
        # An extra: exports can be made without it.
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ExportError(
            "an ONNX export is verified in onnxruntime, which is not installed: install heatlens[cpu] or "
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


def _open_torchscript(path: Path, _outputs: Sequence[Output]) -> _PlainRun:
    with warnings.catch_warnings():
        # Its deprecation is known.
        warnings.simplefilter("ignore")
        try:
            module: Callable[..., Sequence[Tensor]] = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        except Exception as error:
            raise ExportError(f"torch.jit cannot load {path.name} ({type(error).__name__})") from error
    return _in_torch(module)


def _open_pt2(path: Path, _outputs: Sequence[Output]) -> _PlainRun:
    try:
        module: Callable[..., Sequence[Tensor]] = torch.export.load(path).module()
    except Exception as error:
        raise ExportError(f"torch.export cannot load {path.name} ({type(error).__name__})") from error
    return _in_torch(module)


def _in_torch(module: Callable[..., Sequence[Tensor]]) -> _PlainRun:
    @torch.inference_mode()
    def run(image: npt.NDArray[Any], class_index: npt.NDArray[np.int64]) -> Sequence[npt.NDArray[Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = module(torch.from_numpy(image), torch.from_numpy(class_index))
        return [value.numpy() for value in values]

    return run


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "")[:200]


_openers: Mapping[Format, Callable[[Path, Sequence[Output]], _PlainRun]] = {
    Format.ONNX: _open_onnx,
    Format.TORCHSCRIPT: _open_torchscript,
    Format.PT2: _open_pt2,
}
