"""Which graphs keep the images of a batch apart, told by their operators: no image can change another's scores."""

from collections.abc import Callable, Mapping

import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.tape import BATCH, Known, Shape

_ELEMENTWISE = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor"),
        *("Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Less"),
        *("LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal"),
        *("Relu", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Tanh", "Where"),
    }
)
_OF_EACH_IMAGE = frozenset(
    {
        *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "DepthToSpace", "GlobalAveragePool"),
        *("GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LRN", "MaxPool", "SpaceToDepth"),
    }
)
"""Operators whose first axis is that of images, by definition."""

_ALONG_AXIS = frozenset({"Concat", "Hardmax", "LayerNormalization", "LogSoftmax", "Softmax", "Split"})


def keeps_images_apart(model: ir.Model, known: Known) -> bool:
    """Whether every operator computes each image's part of its outputs from that image's part of its inputs.

    Args:
        model: from `read_file`.
        known: its shapes.

    Returns:
        False also where an operator does not tell: it may keep images apart all the same.
    """
    return all(_is_apart(node, known) for node in model.graph)


def _is_apart(node: ir.Node, known: Known) -> bool:
    shapes = [known.shapes.get(value, ()) for value in (*node.inputs, *node.outputs) if value is not None]
    if not any(min(shape, default=0) < 0 for shape in shapes):
        return True
    given = [known.shapes.get(value, ()) for value in node.inputs if value is not None]
    returned = known.shapes.get(node.outputs[0], ())
    batched = [shape for shape in (returned, *given) if _follows_batch(shape)]
    if not _follows_batch(returned) or any(shape[0] != BATCH or min(shape[1:], default=0) < 0 for shape in batched):
        return False
    if node.op_type in _ELEMENTWISE:
        # Images must meet on one axis: shapes are aligned at their ends. What is computed for all images, such as of
        # their number, is not looked into.
        values = [value for value in node.inputs if value is not None and value.const_value is None]
        return all(len(known.shapes.get(value, ())) == len(returned) for value in values) and all(
            _follows_batch(known.shapes[value]) for value in values
        )
    if node.op_type in _OF_EACH_IMAGE:
        by_batch = "training_mode" in node.attributes and node.attributes["training_mode"].as_int() != 0
        return not by_batch and not any(_follows_batch(shape) for shape in given[1:])
    if node.op_type in _ALONG_AXIS:
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        return axis % len(returned) != 0
    check = _OWN.get(node.op_type)
    return check is not None and check(node, given, returned)


def _follows_batch(shape: Shape) -> bool:
    return min(shape, default=0) < 0


def _product(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    del node
    first, second = given[:2]
    both = len(first) == len(second) == len(returned) and len(returned) > 2
    return both if _follows_batch(first) and _follows_batch(second) else _follows_batch(first) and len(first) > 1


def _gemm(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    del returned
    turned = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
    return not turned and not any(_follows_batch(shape) for shape in given[1:])


def _transpose(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    del given, returned
    return "perm" in node.attributes and node.attributes["perm"].as_ints()[0] == 0


def _reduce(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return False
    del returned
    return all(int(axis) % len(given[0]) for axis in axes.const_value.numpy().ravel())


def _flatten(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    del given, returned
    return "axis" not in node.attributes or node.attributes["axis"].as_int() == 1


def _reshape(node: ir.Node, given: list[Shape], returned: Shape) -> bool:
    # Both begin with the number of images, so that an image's elements stay its own.
    del node, returned
    return _follows_batch(given[0])


_OWN: Mapping[str, Callable[[ir.Node, list[Shape], Shape], bool]] = {
    "MatMul": _product,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Flatten": _flatten,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze"), _reshape),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceL2"), _reduce),
}
