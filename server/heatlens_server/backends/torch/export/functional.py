"""Making a captured graph functional, in operators that every format knows, without tracing it again."""

import operator

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from heatlens_server.backends.torch.export.regions import flatten_attention, inline_regions

aten = torch.ops.aten

# Without effect in eval mode.
_DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})


# Views that are made of other operators, and known by their own names all the same.
_KNOWN_VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.view_as.default,
        aten.expand_as.default,
        aten.contiguous.default,
        aten.chunk.default,
        aten.broadcast_to.default,
        aten.narrow.default,
        aten.mT.default,
    }
)

_RENAMED = {aten.split.sizes: aten.split_with_sizes.default}
"""Operators that are another one by a name that fewer formats know."""


def functional(program: ExportedProgram) -> ExportedProgram:
    """Return a program with the same results, none of whose operators writes to its input.

    `relu_(x)` becomes `relu(x)`, and later reads of x read the result. That is right as long as no view of x is held,
    as in modules with `inplace=True`. For anything less simple torch traces the whole program twice more, which takes
    longer than everything else together.

    Args:
        program: as `torch.export` returns it; its graph may be changed.
    """
    graph = program.graph
    inline_regions(program.graph_module)
    flatten_attention(graph)
    if _rewritten(graph):
        _name_batch_norms(graph)
        for node in graph.nodes:
            node.target = _RENAMED.get(node.target, node.target)
        if not any(_is_unknown(node) for node in graph.nodes):
            return program
    decomposed: ExportedProgram = program.run_decompositions({})
    return decomposed


def _rewritten(graph: Graph) -> bool:
    """Take the writes out; False if there is one that is not simple, with the graph still right."""
    nodes = [node for node in graph.nodes if node.op in {"placeholder", "call_function"}]
    position = {node: i for i, node in enumerate(nodes)}
    # By storage: the nodes whose value lies in it and is not overwritten yet.
    living: dict[int, list[Node]] = {}
    for node in nodes:
        if _writes(node) and not _write_removed(node, living, position):
            return False
        if _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            continue
        if node.target is aten.to.dtype:
            # Where it does something it is a copy.
            node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}  # noqa: SLF001
        storage = _storage(node)
        if storage is not None:
            living.setdefault(storage, []).append(node)
    return True


def _write_removed(node: Node, living: dict[int, list[Node]], position: dict[Node, int]) -> bool:
    target = _functional_form(node)
    written = node.args[0]
    if target is None or not isinstance(written, Node) or written.op == "placeholder":
        return False
    storage = _storage(written)
    if storage is None or living.get(storage) != [written]:
        return False
    node.target = target
    written.replace_all_uses_with(node, delete_user_cb=lambda user: position.get(user, len(position)) > position[node])
    living[storage] = []
    return True


def _does_nothing(node: Node) -> bool:
    if node.target in _DROPOUTS:
        return node.args[2] is False
    if node.target is aten.to.dtype:
        source = node.args[0]
        return isinstance(source, Node) and source.meta["val"].dtype is node.args[1]
    return False


def _is_unknown(node: Node) -> bool:
    """Whether a node is a view made of other operators, by a name that formats may not know."""
    target = node.target
    return (
        isinstance(target, OpOverload)
        and target.namespace == "aten"
        and target not in _KNOWN_VIEWS
        and any(result.alias_info is not None for result in target._schema.returns)  # noqa: SLF001 - the only way to ask
        and target._can_decompose()  # noqa: SLF001 - the only way to ask
    )


def _name_batch_norms(graph: Graph) -> None:
    """Say of batch norms that they do not train, the form that every format knows."""
    for node in graph.find_nodes(op="call_function", target=aten.batch_norm.default):
        value, weight, bias, mean, variance, trains, momentum, epsilon, _cudnn = node.args
        if trains:
            continue
        with graph.inserting_before(node):
            norm = graph.call_function(
                aten._native_batch_norm_legit_no_training.default,  # noqa: SLF001 - an operator all the same
                (value, weight, bias, mean, variance, momentum, epsilon),
            )
            # It also returns the statistics of training, which there are none of.
            norm.meta = {**node.meta, "val": (node.meta["val"],)}
            normalised = graph.call_function(operator.getitem, (norm, 0))
            normalised.meta = node.meta
        node.replace_all_uses_with(normalised)
        graph.erase_node(node)


def _writes(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable  # noqa: SLF001 - the only way to ask


def _functional_form(node: Node) -> OpOverload | None:
    """aten.relu.default for aten.relu_.default."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "aten":
        return None
    schema = target._schema  # noqa: SLF001 - the only way to ask
    name = schema.name.removeprefix("aten::")
    written = [argument for argument in schema.arguments if argument.is_write]
    if not name.endswith("_") or name.endswith("__") or written != schema.arguments[:1]:
        return None
    packet = getattr(aten, name.removesuffix("_"), None)
    overload = getattr(packet, schema.overload_name or "default", None)
    return overload if isinstance(overload, OpOverload) else None


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None  # noqa: SLF001 - its identity
