"""Parts of a captured graph that torch keeps as graphs of their own, or in shapes that formats do not know."""

import operator
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

aten = torch.ops.aten

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
_GRADIENT_MODE = torch.ops.higher_order.wrap_with_set_grad_enabled

_KNOWN_RANK = 4
"""What every format takes attention in: (N, heads, tokens, channels)."""


def inline_regions(module: GraphModule) -> None:
    """Put the graphs of `with` blocks where they are called: of gradient modes, and of autocast that is off here.

    A gradient mode does nothing in a graph that is run without autograd. Autocast that is off casts nothing: it is for
    another device, or disabled. Other regions stay.
    """
    graph = module.graph
    found = True
    # A region may hold another one.
    while found:
        found = False
        for node in graph.find_nodes(op="call_function", target=_GRADIENT_MODE):
            _inline(module, node, node.args[1], node.args[2:])
            found = True
        for node in graph.find_nodes(op="call_function", target=_AUTOCAST):
            device, _dtype, enabled, _cache, region, *inputs = node.args
            if enabled and device == "cpu":
                continue
            _inline(module, node, region, inputs)
            found = True
    # Exporters look at every graph that a module holds.
    module.delete_all_unused_submodules()


def flatten_attention(graph: Graph) -> None:
    """Give attention over more than four dimensions the four that every format knows: leading ones become one.

    Attention with a mask is left alone, since the mask broadcasts over the dimensions as they are.
    """
    for node in graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        operands = cast("tuple[Node, Node, Node]", node.args[:3])
        masks = [*node.args[3:4], node.kwargs.get("attn_mask")]
        if node.meta["val"].ndim <= _KNOWN_RANK or any(mask is not None for mask in masks):
            continue
        leading = node.meta["val"].ndim - _KNOWN_RANK
        with graph.inserting_before(node):
            flat = [_call(graph, aten.flatten.using_ints, operand, 0, leading) for operand in operands]
        sizes = [-1, *node.meta["val"].shape[1:]]
        result = node.meta["val"]
        node.args = (*flat, *node.args[3:])
        node.meta["val"] = result.flatten(0, leading)
        with graph.inserting_after(node):
            shaped = graph.call_function(aten.reshape.default, (node, sizes))
        shaped.meta["val"] = result
        node.replace_all_uses_with(shaped, delete_user_cb=lambda user, shaped=shaped: user is not shaped)


def _inline(module: GraphModule, node: Node, region: Any, inputs: Any) -> None:  # noqa: ANN401 - fx's arguments
    graph = module.graph
    part = cast("GraphModule", module.get_submodule(str(region.target)))
    known = dict(zip(part.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in part.graph.nodes:
            if inner.op == "get_attr":
                name = f"{region.target}.{inner.target}"
                known[inner] = graph.get_attr(name)
            elif inner.op == "call_function":
                known[inner] = graph.node_copy(inner, known.__getitem__)
    (outputs,) = part.graph.find_nodes(op="output")
    results = map_arg(outputs.args[0], known.__getitem__)
    for user in list(node.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
    if not region.users:
        graph.erase_node(region)


def _call(graph: Graph, target: Any, source: Node, *args: int) -> Node:  # noqa: ANN401 - an operator
    called = graph.call_function(target, (source, *args))
    called.meta["val"] = target(source.meta["val"], *args)
    return called
