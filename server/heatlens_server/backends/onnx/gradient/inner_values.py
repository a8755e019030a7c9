"""Values that have the shape of a map or of tokens, and are no layer: what attention and linear layers work with."""

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import Known


def is_computed(value: ir.Value | None) -> bool:
    """Whether a value depends on the image: not a weight, nor one that is stored as integers."""
    while value is not None and (node := value.producer()) is not None and node.op_type == "DequantizeLinear":
        value = node.inputs[0]
    return value is not None and value.const_value is None


def attention_scores(model: ir.Model, known: Known) -> set[ir.Value]:
    """Products of two computed tensors, up to the Softmax that they end in: their places are pairs of places."""
    marked: set[ir.Value] = set()
    for node in model.graph:
        computed = [value for value in node.inputs if is_computed(value)]
        is_product = node.op_type in {"MatMul", "Einsum"}
        if is_product:
            starts = len(computed) > 1 and not marked.intersection(computed) and _ends_in_softmax(node.outputs[0])
        else:
            starts = bool(marked.intersection(computed)) and len(known.shapes.get(node.outputs[0], ())) >= 3
        if starts:
            marked.update(node.outputs)
    return marked


def _ends_in_softmax(value: ir.Value) -> bool:
    """Whether a Softmax follows, with nothing but operators on elements and shapes in between."""
    waiting, seen = [value], {value}
    while waiting:
        for node, _place in waiting.pop().uses():
            if node.op_type == "Softmax":
                return True
            if node.op_type in {"Add", "Mul", "Div", "Where", "Reshape", "Transpose", "Cast", "Sub", "Conv", "Clip"}:
                waiting += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
    return False


_TOKENWISE = frozenset({"MatMul", "Gemm", "MatMulInteger"})
_OF_FIRST = frozenset({"Expand", "Reshape", "Slice", "Squeeze", "Tile", "Unsqueeze"})
"""Operators that take sizes and axes beside a value, which may be computed."""
_NOT_ELEMENTWISE = _TOKENWISE | {"Conv", "LayerNormalization", "ReduceMean"}


def linear_outputs(model: ir.Model, known: Known) -> set[ir.Value]:
    """Queries, keys, values and inner activations of linear layers over tokens: the sum behind them is the layer."""
    marked: set[ir.Value] = set()
    for node in model.graph:
        # Not the scales and zero points that are computed where a network is quantised dynamically.
        given = node.inputs[:1] if node.op_type in _OF_FIRST else node.inputs
        computed = [value for value in given if value is not None and is_computed(value) and known.shapes.get(value)]
        rank = len(known.shapes.get(node.outputs[0], ()))
        is_linear = node.op_type in _TOKENWISE and len(computed) == 1 and rank >= 3
        is_sum = node.op_type == "Add" and len(computed) > 1
        follows = bool(computed) and node.op_type not in _NOT_ELEMENTWISE and marked.issuperset(computed)
        if is_linear or (follows and not is_sum):
            marked.update(node.outputs)
    return marked
