"""PyTorch's own formats of a graph: pt2 files of torch.export, and TorchScript."""

import warnings
from pathlib import Path

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from heatlens_server.backends.torch.export.capture import dynamic_shapes, traced_inputs
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import InputKind


def to_pt2(
    graph_module: GraphModule, model: LoadedModel, *, input_kind: InputKind, classes: int | None
) -> ExportedProgram:
    """Export a graph of `differentiate` with a batch of any size, traced anew: what is loaded again checks its inputs.

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


aten = torch.ops.aten


def to_torchscript(graph_module: GraphModule) -> torch.jit.ScriptModule:
    """Script a graph: no Python is needed to run the result, and no autograd.

    TorchScript is deprecated upstream in favour of torch.export; it still is what libtorch applications load.

    Raises:
        ExportError: an operator is unknown to TorchScript.
    """
    scriptable = _scriptable(graph_module)
    try:
        with warnings.catch_warnings():
            # Its deprecation is known.
            warnings.simplefilter("ignore")
            scripted = torch.jit.script(scriptable)
            frozen: torch.jit.ScriptModule = torch.jit.freeze(scripted.eval())
            return frozen
    # Its compiler has exception classes of its own for what it does not know.
    except Exception as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise ExportError(f"the graph cannot be scripted ({first_line})") from error


def save_torchscript(scripted: torch.jit.ScriptModule, path: Path) -> None:
    """Write a scripted graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(scripted, str(path))


def _scriptable(graph_module: GraphModule) -> GraphModule:
    """The same graph in TorchScript's own operators: overloads become names, which it resolves by itself."""
    graph = torch.fx.Graph()
    known: dict[Node, Node] = {}
    device: Node | None = None
    for node in graph_module.graph.nodes:
        copied = graph.node_copy(node, known.__getitem__)
        known[node] = copied
        if copied.op == "placeholder" and device is None:
            # What the graph makes by itself is made where the images are, not where it was traced.
            device = graph.call_function(getattr, (copied, "device"))
        if copied.op != "call_function":
            continue
        if copied.target is aten.sym_size.int:
            copied.target = aten.size
        elif isinstance(copied.target, OpOverload):
            copied.kwargs = {
                name: device if name == "device" else value
                for name, value in copied.kwargs.items()
                if name != "pin_memory"
            }
            copied.target = copied.target.overloadpacket
    return GraphModule(graph_module, graph, class_name="Explainer")
