"""A model as one static graph that explains: the forward pass, the differentiated tail, the map."""

from collections.abc import Sequence

from torch import Tensor
from torch.fx import GraphModule, Node

from heatlens_server.backends.torch.export.assembly import Assembly
from heatlens_server.backends.torch.export.capture import Captured, capture
from heatlens_server.backends.torch.export.tail import (
    LOGIT,
    Goal,
    tail_of,
    trace_activation_map,
    trace_map,
    trace_ranked,
    trace_resolve,
    trace_rows,
)
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.graph_spec import MAP_OUTPUTS, GraphSpec, Output
from heatlens_server.core.methods import Method


def differentiate(model: LoadedModel, spec: GraphSpec) -> GraphModule:
    """Turn a model into one static graph that explains.

    Args:
        model: left as it was; in fp32 its parameters are shared with the graph, not copied.
        spec: which graph.

    Returns:
        A graph from (image, class_index) to the tuple of outputs. It holds no autograd, hook or training mode, and
        works for every batch size.

    Raises:
        ExportError: the model cannot be turned into such a graph.
    """
    captured = capture(model, [spec.layer], input_kind=spec.input, precision=spec.precision, classes=spec.classes)
    return differentiate_layer(captured, spec)


def differentiate_layer(captured: Captured, spec: GraphSpec) -> GraphModule:
    """Make the graph of one of the captured layers; see `differentiate`."""
    if spec.method.traits.class_free and Output.GRADIENTS not in spec.outputs:
        return _without_backward(captured, spec)
    assembly = Assembly(captured)
    goal = Goal(spec.score, spec.sigmoid)
    if spec.classes is None:
        logits, class_id = _resolved(assembly, captured)
        activations, gradients, fakes = _rows(assembly, captured, spec.layer, class_id, goal)
    else:
        tail = tail_of(captured, spec.layer)
        part = trace_ranked(captured, tail, spec.classes, goal)
        inputs = [assembly.node(node) for node in (tail.mark, captured.class_index, *tail.needs)]
        logits, class_id, activations, gradients = assembly.inline(part, inputs)
        fakes = _traced_values(part)[2:]
    nodes = {
        Output.LOGITS: logits,
        Output.CLASS_ID: class_id,
        Output.ACTIVATIONS: activations,
        Output.GRADIENTS: gradients,
    }
    if not set(MAP_OUTPUTS).isdisjoint(spec.outputs):
        maps = _maps(assembly, captured, spec.method, (class_id, activations, gradients), fakes)
        nodes |= dict(zip(MAP_OUTPUTS, maps, strict=True))
    return assembly.finish([nodes[output] for output in spec.outputs])


def _without_backward(captured: Captured, spec: GraphSpec) -> GraphModule:
    """The graph of a method that reads activations alone: nothing is differentiated."""
    assembly = Assembly(captured)
    mark = captured.marks[spec.layer]
    logits, class_id = _resolved(assembly, captured)
    part = trace_activation_map(spec.method, mark.meta["val"], captured.class_index.meta["val"])
    activations, *maps = assembly.inline(part, [assembly.node(mark), class_id])
    nodes = {Output.LOGITS: logits, Output.CLASS_ID: class_id, Output.ACTIVATIONS: activations}
    nodes |= dict(zip(MAP_OUTPUTS, maps, strict=True))
    return assembly.finish([nodes[output] for output in spec.outputs])


def _resolved(assembly: Assembly, captured: Captured) -> tuple[Node, Node]:
    part = trace_resolve(captured)
    logits, class_id = assembly.inline(part, [assembly.node(captured.logits), assembly.node(captured.class_index)])
    return logits, class_id


def _maps(
    assembly: Assembly,
    captured: Captured,
    method: Method,
    nodes: tuple[Node, Node, Node],
    fakes: Sequence[Tensor],
) -> list[Node]:
    """Add a method's map, scale and offset to the nodes of class ids, activations and gradients."""
    class_id, activations, gradients = nodes
    if not method.traits.class_free:
        return assembly.inline(trace_map(method, *fakes), [activations, gradients])
    part = trace_activation_map(method, fakes[0], captured.class_index.meta["val"])
    return assembly.inline(part, [activations, class_id])[1:]


def _rows(
    assembly: Assembly, captured: Captured, layer: str, class_id: Node, goal: Goal = LOGIT
) -> tuple[Node, Node, list[Tensor]]:
    """Add a layer's activations and gradients; return their nodes and what they were traced as."""
    tail = tail_of(captured, layer)
    part = trace_rows(captured, tail, goal)
    activations, gradients = assembly.inline(part, [class_id, *map(assembly.node, (tail.mark, *tail.needs))])
    return activations, gradients, _traced_values(part)


def _traced_values(part: GraphModule) -> list[Tensor]:
    (output,) = part.graph.find_nodes(op="output")
    return [value.meta["val"] for value in output.args[0]]
