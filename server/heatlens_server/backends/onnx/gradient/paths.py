"""Paths through a graph: what all of them go through."""

from collections import Counter

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.differentiate import depending


def bottlenecks(end: ir.Value, *, by_gradient: bool = False) -> set[ir.Value]:
    """The values on every path through the graph to a value: when they are computed, nothing else waits to be read.

    Args:
        end: of the paths.
        by_gradient: whether paths count only where a small change goes along them, which it does not through shapes.
    """
    producer = end.producer()
    graph = None if producer is None else producer.graph
    if graph is None:
        return set()
    moving = depending(list(graph), graph.inputs) if by_gradient else None
    needed = {end}
    nodes = []
    for node in reversed(list(graph)):
        if needed.intersection(node.outputs):
            nodes.append(node)
            computed = (value for value in node.inputs if value is not None and value.const_value is None)
            needed.update(value for value in computed if moving is None or value in moving)
    left = Counter(value for node in nodes for value in node.inputs if value in needed)
    waiting, found = set(graph.inputs) & needed, set()
    for node in reversed(nodes):
        for value in node.inputs:
            if value is not None and value in left:
                left[value] -= 1
                if not left[value]:
                    waiting.discard(value)
        waiting.update(value for value in node.outputs if value in needed)
        if len(waiting) == 1:
            found |= waiting
    return found
