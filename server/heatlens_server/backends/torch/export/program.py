"""A graph of `differentiate` as torch's ONNX exporter takes it. It was traced while it was made: once is enough."""

from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node


def to_program(graph_module: GraphModule) -> ExportedProgram:
    """Wrap a graph without tracing it again, which takes as long as making it did.

    Args:
        graph_module: left as it was; its tensors are shared.

    Returns:
        The same graph. Every tensor in it is an input that the program holds, and every size is computed once.
    """
    graph = Graph()
    known: dict[Node, Node] = {}
    tensors: dict[str, Tensor] = {}
    inputs: list[InputSpec] = []
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    fake_mode = placeholders[0].meta["val"].fake_mode
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        tensors[name] = getattr(graph_module, name)
        known[node] = _valued(graph.placeholder(name), fake_mode.from_tensor(tensors[name], static_shapes=True))
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(known[node].name), name, persistent=True))
    for node in placeholders:
        known[node] = _valued(graph.placeholder(node.name), node.meta["val"])
        inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(known[node].name), None))
    sizes: dict[object, Node] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        value = node.meta["val"]
        # Parts that were traced apart each ask for the same sizes.
        size = value.node.expr if isinstance(value, SymInt) else None
        if size in sizes:
            known[node] = sizes[size]
            continue
        known[node] = _valued(graph.node_copy(node, known.__getitem__), value)
        if size is not None:
            sizes[size] = known[node]
    (output,) = graph_module.graph.find_nodes(op="output")
    results = tuple(known[node] for node in output.args[0])
    graph.output(results)
    graph.eliminate_dead_code()
    return ExportedProgram(
        root=nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(
            inputs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
        ),
        state_dict=tensors,
        # The exporter reads the sizes of the values themselves.
        range_constraints={},
        module_call_graph=[ModuleCallEntry("")],
    )


def _valued(node: Node, value: object) -> Node:
    """Give a node its value, and no module that it came from: files tell nothing of the network's code."""
    node.meta = {"val": value, "nn_module_stack": {}}
    return node
