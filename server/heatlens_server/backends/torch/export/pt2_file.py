"""A graph as an exported program, `.pt2`."""

from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from heatlens_server.backends.torch.export.capture import dynamic_shapes, traced_inputs
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind


def to_program(
    graph_module: GraphModule, model: LoadedModel, *, input_kind: InputKind, classes: int | None
) -> ExportedProgram:
    """Export a graph of `differentiate` with a batch of any size.

    Raises:
        ExportError: it cannot be exported.
    """
    try:
        with torch.no_grad():
            return torch.export.export(
                graph_module,
                traced_inputs(model, input_kind, classes),
                dynamic_shapes=dynamic_shapes(model, classes),
                strict=False,
            )
    except Exception as error:
        first_line = str(error).split("\n", maxsplit=1)[0][:200]
        raise ExportError(f"the graph cannot be exported ({type(error).__name__}: {first_line})") from error


def save(program: ExportedProgram, path: Path) -> None:
    """Write a program."""
    torch.export.save(program, path)
