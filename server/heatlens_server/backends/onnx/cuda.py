"""Runs an onnxruntime session on a GPU: small batches as CUDA graphs with their tensors kept in device memory.

A small batch is bound by launching kernels one by one; a captured graph launches them all at once. What it reads and
writes must stay where it was when it was captured, so each batch size has tensors of its own, bound once (I/O binding).
Large batches keep the GPU busy as they are.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.providers import CUDA, Choice, Runtime, Session, SessionOptions, open_session
from heatlens_server.core.errors import ModelLoadError

_log = logging.getLogger(__name__)

Array = npt.NDArray[Any]
RunOptions = Any

_BUCKETS = (1, 2, 4, 8)
"""Batch sizes that are captured; smaller batches are filled up to the next one."""

# onnxruntime's id for "do not capture this run".
_NO_GRAPH = "-1"


@dataclass(frozen=True, slots=True, eq=False)
class _Captured:
    """One batch size's graph: its number, and the tensors that it reads and writes."""

    options: RunOptions
    binding: Any
    inputs: Mapping[str, Any]


def open_graphed(
    runtime: Runtime,
    graph: Path | bytes,
    options: SessionOptions,
    choice: Choice,
    *,
    outputs: Sequence[str],
    probe: Mapping[str, Array],
) -> "GraphedSession | None":
    """Open a session with CUDA graphs and try it out.

    Args:
        runtime: the onnxruntime module.
        graph: the ONNX file, or what is in one.
        options: from `providers.session_options`.
        choice: on the CUDA provider.
        outputs: names of the outputs to return.
        probe: inputs of one row.

    Returns:
        The session; None if this graph cannot be captured, or the provider is missing.

    Raises:
        ModelLoadError: the provider asked for does not work.
    """
    providers = tuple(
        (name, {**settings, "enable_cuda_graph": "1"} if name == CUDA else settings)
        for name, settings in choice.providers
    )
    try:
        session, used = open_session(runtime, graph, options, replace(choice, providers=providers))
        if used.name != CUDA:
            return None
        graphed = GraphedSession(runtime, session, outputs=outputs, device=choice.device)
        # The first run captures, the second replays.
        graphed.run(probe)
        graphed.run(probe)
    except ModelLoadError:
        raise
    # onnxruntime has an exception class for each of its status codes.
    except Exception as error:
        _log.warning("onnxruntime runs without CUDA graphs: %s", error)
        return None
    return graphed


class GraphedSession:
    """A CUDA session made with `enable_cuda_graph`. Threads take turns: captured graphs allow no more."""

    def __init__(self, runtime: Runtime, session: Session, *, outputs: Sequence[str], device: str) -> None:
        """Wrap a session.

        Args:
            runtime: the onnxruntime module.
            session: on the CUDA provider, with `enable_cuda_graph`.
            outputs: names of the outputs to return.
            device: where its tensors are kept, "cuda:0".
        """
        self._runtime = runtime
        self._session = session
        self._outputs = list(outputs)
        kind, _, index = device.partition(":")
        self._device = (kind, int(index or 0))
        self._captured: dict[int, _Captured] = {}
        self._turn = threading.Lock()

    def run(self, feeds: Mapping[str, Array]) -> list[Array]:
        """Run on inputs whose first dimension is the batch; return the outputs, in order, in host memory."""
        with self._turn:
            # More classes per image are rare, and would need a graph for every number of them.
            one_class = all(feed.shape[1] == 1 for feed in feeds.values() if feed.ndim == 2)
            count = len(next(iter(feeds.values())))
            bucket = next((size for size in _BUCKETS if size >= count), None)
            if bucket is None or not one_class:
                return self._run_plain(feeds)
            filled = {name: _filled(feed, bucket) for name, feed in feeds.items()}
            if bucket not in self._captured:
                self._captured[bucket] = self._bind(bucket, filled)
            return [output[:count] for output in self._replay(self._captured[bucket], filled)]

    def _run_plain(self, feeds: Mapping[str, Array]) -> list[Array]:
        outputs: list[Array] = self._session.run(self._outputs, dict(feeds), self._options(_NO_GRAPH))
        return outputs

    def _bind(self, bucket: int, feeds: Mapping[str, Array]) -> _Captured:
        """Make the tensors of a batch size. A plain run tells the outputs' shapes, and warms the memory pool up."""
        ort_value = self._runtime.OrtValue
        binding = self._session.io_binding()
        inputs = {name: ort_value.ortvalue_from_numpy(feed, *self._device) for name, feed in feeds.items()}
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, output in zip(self._outputs, self._run_plain(feeds), strict=True):
            value = ort_value.ortvalue_from_shape_and_type(output.shape, output.dtype, *self._device)
            binding.bind_ortvalue_output(name, value)
        # The number that onnxruntime files the captured graph under: the batch size does.
        return _Captured(self._options(str(bucket)), binding, inputs)

    def _replay(self, captured: _Captured, feeds: Mapping[str, Array]) -> list[Array]:
        for name, feed in feeds.items():
            captured.inputs[name].update_inplace(feed)
        self._session.run_with_iobinding(captured.binding, captured.options)
        outputs: list[Array] = captured.binding.copy_outputs_to_cpu()
        return outputs

    def _options(self, graph_id: str) -> RunOptions:
        options = self._runtime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph_id)
        return options


def _filled(feed: Array, rows: int) -> Array:
    """Repeat the first row behind the last one, up to so many rows."""
    if len(feed) == rows:
        return np.ascontiguousarray(feed)
    return np.concatenate([feed, np.repeat(feed[:1], rows - len(feed), axis=0)])
