"""A graph as onnxruntime opens it: bytes without weights, and the weights beside them. Needs no package but numpy.

Weights of megabytes are so never serialised, and several sessions of one network can share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from heatlens_server.backends.onnx.providers import ON_CPU, Choice, Runtime, Session, open_session, session_options

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class PackedGraph:
    """A graph, and its weights.

    Attributes:
        graph: an ONNX file's bytes, in which every one of `weights` is an initialiser with external data.
        weights: by name.
    """

    graph: bytes
    weights: Mapping[str, Array]


class OpenGraph:
    """A session that keeps the weights it reads."""

    def __init__(self, session: Session, weights: Mapping[str, Array]) -> None:
        """Wrap a session.

        Args:
            session: of onnxruntime.
            weights: that it was given; it reads their memory and holds no reference.
        """
        self.session = session
        self._weights = weights

    def get_inputs(self) -> Sequence[Any]:
        """Inputs, as onnxruntime describes them."""
        found: Sequence[Any] = self.session.get_inputs()
        return found

    def get_outputs(self) -> Sequence[Any]:
        """Outputs, as onnxruntime describes them."""
        found: Sequence[Any] = self.session.get_outputs()
        return found

    def run(self, outputs: Sequence[str] | None, feeds: Mapping[str, Array]) -> list[Array]:
        """Run; returns the named outputs, or all."""
        found: list[Array] = self.session.run(None if outputs is None else list(outputs), dict(feeds))
        return found


def open_packed(
    runtime: Runtime,
    packed: PackedGraph,
    choice: Choice = ON_CPU,
    *,
    threads: int | None = None,
    runs_once: bool = False,
) -> tuple[OpenGraph, Choice]:
    """Open a session on a packed graph.

    Args:
        runtime: the onnxruntime module.
        packed: the graph.
        choice: where it runs.
        threads: for one run on a CPU; None for as many as there are cores for this process.
        runs_once: whether it runs a few times only: then weights are not laid out anew, which takes longer than a run
            and as much memory as they.

    Returns:
        The session, and where it runs.

    Raises:
        ModelLoadError: the provider asked for does not work.
    """
    options = session_options(runtime, threads=threads)
    if runs_once:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    weights = {name: np.ascontiguousarray(array) for name, array in packed.weights.items()}
    values = [runtime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    session, used = open_session(runtime, packed.graph, options, choice)
    return OpenGraph(session, weights), used
