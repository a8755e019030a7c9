"""Putting one graph together from captured and traced parts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from heatlens_server.backends.torch.export.capture import MARK, Captured
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import CLASS_INDEX, IMAGE

if TYPE_CHECKING:
    from torch._ops import OpOverload

aten = torch.ops.aten

_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})  # noqa: SLF001 - so called


class Assembly:
    """A graph in the making, from (image, class_index).

    What depends on parameters alone is computed once, here, and becomes a constant of the graph: attention masks,
    standardised weights, position tables. Views of parameters stay as they are, so that no weight is stored twice.
    """

    def __init__(self, captured: Captured) -> None:
        self._captured = captured
        self._graph = Graph()
        self._root = nn.Module()
        self._tensors: dict[int, Node] = {}
        self._values: dict[Node, Tensor] = dict(captured.constants)
        self._constant_nodes: dict[Node, bool] = {}
        self._known: dict[Node, Node] = {}
        for source, name in ((captured.image, IMAGE), (captured.class_index, CLASS_INDEX)):
            self._known[source] = self._graph.placeholder(name)
            self._known[source].meta["val"] = source.meta["val"]

    def node(self, source: Node) -> Node:
        """The node that computes what a captured node computes; copied here with all it needs, if it is not yet."""
        needed = {source}
        for node in reversed(self._captured.nodes):
            if node in needed and node not in self._known:
                needed.update(node.all_input_nodes)
        for node in self._captured.nodes:
            if node in needed and node not in self._known and not self._is_constant(node):
                self._copy(node)
        return self._read(source)

    def inline(self, part: GraphModule, inputs: Sequence[Node]) -> list[Node]:
        """Append a traced part, and return the nodes of its outputs."""
        placeholders = part.graph.find_nodes(op="placeholder")
        known: dict[Node, Node] = dict(zip(placeholders, inputs, strict=True))
        for node in part.graph.nodes:
            if node.op == "get_attr":
                known[node] = self._constant(cast("Tensor", getattr(part, str(node.target))))
        outputs = self._graph.graph_copy(part.graph, known)
        return list(cast("tuple[Node, ...]", outputs))

    def finish(self, outputs: Sequence[Node]) -> GraphModule:
        """Return the graph with these outputs, without nodes that lead to none."""
        self._graph.output(tuple(outputs))
        self._graph.eliminate_dead_code()
        for node in self._graph.nodes:
            if node.target in _VIEWS:
                # A view is of the strides that were traced; callers' tensors may be channels_last or transposed.
                node.target = aten.reshape.default
        self._graph.lint()
        return GraphModule(self._root, self._graph, class_name="Explainer")

    def _copy(self, node: Node) -> None:
        if node.target is MARK:
            self._known[node] = self._read(cast("Node", node.args[0]))
            return
        copied = self._graph.node_copy(node, self._read)
        copied.meta = {"val": node.meta["val"]}
        self._known[node] = copied

    def _is_constant(self, node: Node) -> bool:
        """Whether a node depends on parameters alone, and is worth computing now."""
        if node not in self._constant_nodes:
            value = node.meta.get("val")
            self._constant_nodes[node] = node in self._values or (
                node.op == "call_function"
                and node.target is not MARK
                and isinstance(value, Tensor)
                and all(isinstance(size, int) for size in value.shape)
                and all(self._is_constant(source) for source in node.all_input_nodes)
            )
        return self._constant_nodes[node]

    def _read(self, node: Node) -> Node:
        """The node in this graph that stands for a captured node whose needs are here."""
        if node not in self._known:
            if not self._is_constant(node):
                raise ExportError(f"the network's graph reads {node.name} before it is computed")
            if node not in self._values and _is_view(node):
                self._copy(node)
            else:
                self._known[node] = self._constant(self._evaluate(node))
        return self._known[node]

    def _evaluate(self, node: Node) -> Tensor:
        if node not in self._values:
            args, kwargs = map_arg((node.args, node.kwargs), self._evaluate)
            with torch.no_grad():
                self._values[node] = cast("OpOverload", node.target)(*args, **kwargs)
        return self._values[node]

    def _constant(self, value: Tensor) -> Node:
        known = self._tensors.get(id(value))
        if known is None:
            name = f"constant_{len(self._tensors)}"
            self._root.register_buffer(name, value.detach().contiguous())
            # Constants come first: a part that is read later may not define what an earlier one reads.
            with self._graph.inserting_before(next(iter(self._graph.nodes))):
                known = self._graph.get_attr(name)
            self._tensors[id(value)] = known
        return known


def _is_view(node: Node) -> bool:
    schema = cast("OpOverload", node.target)._schema  # noqa: SLF001 - the only way to ask
    return any(result.alias_info is not None for result in schema.returns)
