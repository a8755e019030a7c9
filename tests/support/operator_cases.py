"""Every operator that has a rule of differentiation, in a grid of shapes and attributes: small graphs in float64."""

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir.passes.common import AddDefaultAttributesPass
from onnxruntime import InferenceSession

from heatlens_server.backends.onnx.gradient.differentiate import RULES, differentiate
from heatlens_server.backends.onnx.gradient.tape import Known

OPSET = 24
DOUBLE = onnx.TensorProto.DOUBLE


class Erf(OpRun):
    """In float64: onnx's own rounds to float32."""

    def _run(self, x):
        return (np.vectorize(math.erf, otypes=[np.float64])(x),)


class Gelu(OpRun):
    """With that function."""

    def _run(self, x, approximate="none"):
        if approximate == "tanh":
            return (x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,)
        return (x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,)


class Mean(OpRun):
    """Of operands that are broadcast, which onnx's own adds in place."""

    def _run(self, *operands):
        return (sum(operands) / len(operands),)


# What onnx's reference implementation gets wrong or refuses, onnxruntime does in float64.
BY_ONNXRUNTIME = {"AffineGrid", "GatherElements", "GridSample", "MaxPool", "Pad", "ScatterElements", "LpNormalization"}


def runner(one: "Case", model: onnx.ModelProto):
    """What runs a model: from feeds to outputs."""
    if one.op not in BY_ONNXRUNTIME:
        return partial(ReferenceEvaluator(model, new_ops=[Erf, Gelu, Mean]).run, None)
    model.ir_version = 10
    return partial(InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run, None)


@dataclass(frozen=True)
class Case:
    """An operator on arrays.

    Attributes:
        op: its name.
        inputs: random numbers of a shape; an array that is a constant; Computed; None for an absent one.
        attributes: of the operator.
        by: the places of the inputs to differentiate by.
        low, high: the random numbers' range.
        outputs: how many the operator has.
    """

    op: str
    inputs: tuple
    attributes: dict = field(default_factory=dict)
    by: tuple[int, ...] = (0,)
    low: float = -2.0
    high: float = 2.0
    outputs: int = 1


@dataclass(frozen=True)
class Computed:
    """Integers that are no constant of the graph."""

    array: np.ndarray


def computed(*values):
    return Computed(np.array(values))


def shape(*lengths):
    return lengths


def ints(*values):
    return np.array(values, np.int64)


def case(op, *inputs, by=(0,), low=-2.0, high=2.0, outputs=1, **attributes):
    return Case(op, inputs, attributes, by, low, high, outputs)


IMAGE = shape(2, 3, 6, 8)
UNARY = {
    "Abs": {}, "Celu": {"alpha": 0.7}, "Cos": {}, "Elu": {"alpha": 1.3}, "Erf": {}, "Exp": {}, "HardSwish": {},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "LeakyRelu": {"alpha": 0.2}, "Mish": {}, "Neg": {}, "Relu": {},
    "Selu": {}, "Shrink": {"lambd": 0.5, "bias": 0.2}, "Sigmoid": {}, "Sin": {}, "Softplus": {}, "Softsign": {},
    "Swish": {"alpha": 1.5}, "Tanh": {}, "ThresholdedRelu": {"alpha": 0.6}, "Identity": {}, "Dropout": {},
}  # fmt: skip
CASES = [
    *(case(op, shape(2, 3, 4), **attributes) for op, attributes in UNARY.items()),
    *(case(op, shape(2, 3, 4), low=0.5) for op in ("Log", "Reciprocal", "Sqrt")),
    case("Gelu", shape(2, 3, 4)),
    case("Gelu", shape(2, 3, 4), approximate="tanh"),
    case("HardSwish", shape(2, 40), low=-5, high=5),
    case("Clip", shape(2, 3, 4), np.array(-1.0), np.array(0.5)),
    case("Clip", shape(2, 3, 4), np.array(-1.0)),
    case("PRelu", shape(2, 3, 4), np.array([[0.1], [0.2], [0.3]])),
    *(case("Softmax", shape(2, 3, 4), axis=axis) for axis in (-1, 1)),
    *(case("LogSoftmax", shape(2, 3, 4), axis=axis) for axis in (-1, 1)),
    # Arithmetic, with every way to broadcast.
    *(
        case(op, *shapes, by=(0, 1), low=0.5)
        for op in ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Mean", "Sum")
        for shapes in (
            (shape(2, 3, 4), shape(2, 3, 4)),
            (shape(2, 3, 4), shape(3, 1)),
            (shape(4), shape(2, 3, 4)),
            (shape(2, 1, 4), shape(2, 3, 1)),
            (shape(2, 3), shape()),
        )
    ),
    case("Sum", shape(2, 3), shape(3), shape(2, 1), by=(0, 1, 2)),
    case("Max", shape(2, 3), shape(3), shape(2, 1), by=(0, 1, 2)),
    case("Pow", shape(2, 3), np.array(2.0)),
    case("Pow", shape(2, 3), np.array(-1.5), low=0.5),
    case("Pow", shape(2, 3), ints(3)),
    case("Pow", shape(2, 3), np.array([[1.0, 2.0, 3.0]]), low=0.5),
    case("Where", np.array([[True], [False]]), shape(2, 3), shape(3), by=(1, 2)),
    # Moving elements.
    case("Reshape", shape(2, 3, 4), ints(2, -1)),
    case("Flatten", shape(2, 3, 4), axis=2),
    case("Squeeze", shape(2, 1, 4, 1), ints(1, -1)),
    case("Unsqueeze", shape(2, 4), ints(0, -1)),
    case("Transpose", shape(2, 3, 4)),
    case("Transpose", shape(2, 3, 4), perm=[1, 2, 0]),
    case("Expand", shape(3, 1), ints(2, 1, 4)),
    case("Tile", shape(2, 3), ints(3, 2)),
    case("Concat", shape(2, 3), shape(2, 1), shape(2, 4), by=(0, 1, 2), axis=1),
    case("Concat", shape(2, 3), shape(2, 3), by=(1,), axis=-1),
    case("Split", shape(2, 7), ints(3, 4), axis=1, outputs=2),
    case("Split", shape(6, 2), axis=0, num_outputs=3, outputs=3),
    case("Slice", shape(4, 6), ints(1), ints(5), ints(1)),
    case("Slice", shape(4, 6), ints(0, -1), ints(4, -100), ints(0, 1), ints(2, -2)),
    case("Slice", shape(4, 6), ints(-3, 0), ints(1000, 3)),
    case("Gather", shape(4, 6), ints(3, 0), axis=1),
    case("Gather", shape(4, 6), ints(3, 3, -1, 0), axis=0),
    case("Gather", shape(4, 3, 5), np.array([[0, 1], [1, 2]]), axis=1),
    case("Gather", shape(4, 6), np.array(2), axis=1),
    case("GatherElements", shape(2, 4), np.array([[0, 0, 3], [1, -1, 2]]), axis=1),
    case("Gather", shape(4, 6), computed(3, 3, 0, -1), axis=0),
    case("Gather", shape(4, 3, 6), computed([5, -2], [5, 0]), axis=2),
    case("GatherND", shape(3, 4, 2), np.array([[0, 1], [0, 1], [2, 3]])),
    case("GatherND", shape(3, 4, 2), np.array([[[0], [3]], [[1], [1]], [[-1], [2]]]), batch_dims=1),
    case("GatherND", shape(2, 3, 4, 2), np.array([[[1], [2], [3]], [[0], [0], [1]]]), batch_dims=2),
    case("Compress", shape(4, 6), np.array([True, False, True]), axis=0),
    case("Compress", shape(3, 4), np.array([False, True, True, False, True])),
    case("Trilu", shape(2, 3, 4)),
    case("Trilu", shape(2, 3, 4), np.array(-1), upper=0),
    *(
        case("ScatterElements", shape(3, 4), np.array([[0, 2], [1, 3]]), shape(2, 2), by=(0, 2), axis=1, **more)
        for more in ({}, {"reduction": "add"})
    ),
    *(
        case("ScatterND", shape(4, 3), np.array([[3], [1]]), shape(2, 3), by=(0, 2), **more)
        for more in ({}, {"reduction": "add"})
    ),
    *(case("Pad", shape(2, 5, 6), ints(0, 1, 2, 0, 2, 1), mode=mode) for mode in ("constant", "edge", "reflect")),
    case("Pad", shape(2, 5), ints(0, -1, 0, 2)),
    case("Pad", shape(2, 5), ints(1, 2), np.array(0.0), ints(-1)),
    *(case("DepthToSpace", shape(2, 12, 2, 3), blocksize=2, mode=mode) for mode in ("DCR", "CRD")),
    case("SpaceToDepth", shape(2, 3, 4, 6), blocksize=2),
    *(case("CumSum", shape(2, 4), np.array(1), exclusive=e, reverse=r) for e in (0, 1) for r in (0, 1)),
    case("TopK", shape(2, 5), ints(3), axis=1, outputs=2),
    # Sums.
    *(
        case(op, shape(2, 3, 4), *axes, low=0.5, keepdims=keepdims)
        for op in sorted(RULES)
        if op.startswith("Reduce")
        for axes in ((), (ints(1),), (ints(0, -1),))
        for keepdims in (0, 1)
    ),
    case("ReduceSum", shape(2, 3), noop_with_empty_axes=1),
    case("ReduceProd", shape(2, 3), noop_with_empty_axes=1),
    # Products.
    *(
        case("MatMul", one, other, by=(0, 1))
        for one, other in (
            (shape(3, 4), shape(4, 5)),
            (shape(2, 3, 4), shape(4, 5)),
            (shape(3, 4), shape(2, 4, 5)),
            (shape(2, 1, 3, 4), shape(3, 4, 5)),
            (shape(4), shape(4, 5)),
            (shape(3, 4), shape(4)),
            (shape(4), shape(4)),
            (shape(2, 3, 4), shape(4)),
        )
    ),
    *(
        case("Gemm", shape(*((4, 3) if a else (3, 4))), shape(*((5, 4) if b else (4, 5))), bias, by=by, transA=a,
             transB=b, alpha=0.5, beta=1.5)
        for a in (0, 1) for b in (0, 1) for bias, by in ((shape(5), (0, 1, 2)), (shape(3, 1), (0, 2)))
    ),
    case("Gemm", shape(3, 4), shape(4, 5), by=(0, 1)),
    *(
        case("Einsum", *shapes, by=tuple(range(len(shapes))), equation=equation)
        for equation, shapes in (
            ("bhqd,bhkd->bhqk", (shape(2, 2, 3, 4), shape(2, 2, 5, 4))),
            ("ij,jk->ik", (shape(2, 3), shape(3, 4))),
            ("ijk,j->k", (shape(2, 3, 4), shape(3))),
            ("ij->ji", (shape(2, 3),)),
            ("ij,k,kl->il", (shape(2, 3), shape(4), shape(4, 5))),
            ("...ij,jk->...ik", (shape(2, 2, 3, 4), shape(4, 5))),
            ("...ij,...jk->...ik", (shape(2, 2, 3, 4), shape(2, 4, 5))),
            ("bi,ij", (shape(2, 3), shape(3, 4))),
        )
    ),
    # Convolutions.
    *(
        case("Conv", IMAGE, shape(4, 3, *kernel), shape(4), strides=list(strides), pads=list(pads),
             dilations=list(taps))
        for kernel, strides, pads, taps in (
            ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
            ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
            ((3, 2), (1, 1), (0, 1, 2, 0), (1, 1)),
            ((3, 3), (1, 1), (2, 2, 2, 2), (2, 2)),
            ((3, 3), (2, 3), (2, 0, 1, 2), (1, 2)),
            ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
            ((1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
            ((1, 1), (1, 1), (1, 1, 1, 1), (1, 1)),
            ((2, 2), (3, 3), (0, 0, 0, 0), (1, 1)),
        )
    ),
    *(
        case("Conv", shape(2, 4, 5, 6), shape(*weights, 3, 3), group=group, strides=list(strides), pads=[1, 1, 1, 1])
        for weights, group in (((4, 1), 4), ((8, 1), 4), ((6, 2), 2))
        for strides in ((1, 1), (2, 2))
    ),
    *(
        case("Conv", IMAGE, shape(2, 3, 3, 4), auto_pad=pad, strides=[2, 2])
        for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    case("Conv", shape(2, 3, 7), shape(4, 3, 3), pads=[1, 1], strides=[2]),
    case("Conv", shape(1, 2, 4, 5, 3), shape(3, 2, 2, 2, 2)),
    *(
        case("ConvTranspose", shape(2, 3, 4, 5), shape(3, 2, 3, 3), strides=[stride, stride], **more)
        for stride, more in (
            (1, {}),
            (2, {"pads": [1, 1, 1, 1], "output_padding": [1, 1]}),
            (2, {}),
            (3, {"dilations": [2, 1]}),
            (2, {"auto_pad": "SAME_UPPER"}),
            (3, {"auto_pad": "SAME_LOWER", "output_padding": [1, 0]}),
            (2, {"auto_pad": "SAME_LOWER", "output_shape": [8, 10]}),
        )
    ),
    # Places that are computed. Beyond [-1, 1] they lie outside of the image.
    *(
        case("GridSample", shape(2, 3, 4, 5), shape(2, 3, 4, 2), by=(0, 1), mode=mode, padding_mode=padding,
             align_corners=aligned)
        for mode in ("linear", "nearest") for padding in ("zeros", "border", "reflection") for aligned in (0, 1)
    ),
    *(case("AffineGrid", shape(2, 2, 3), ints(2, 1, *size), align_corners=aligned)
      for size in ((4, 5), (3, 3)) for aligned in (0, 1)),
    # Windows.
    *(
        case("MaxPool", IMAGE, kernel_shape=list(kernel), strides=list(strides), pads=list(pads), ceil_mode=ceil)
        for kernel, strides, pads, ceil in (
            ((2, 2), (2, 2), (0, 0, 0, 0), 0),
            ((3, 3), (2, 2), (1, 1, 1, 1), 0),
            ((3, 3), (1, 1), (1, 1, 1, 1), 0),
            ((3, 3), (2, 2), (0, 0, 0, 0), 1),
        )
    ),
    *(
        case("AveragePool", IMAGE, kernel_shape=list(kernel), strides=list(strides), pads=list(pads),
             count_include_pad=pad, ceil_mode=ceil)
        for kernel, strides, pads, pad, ceil in (
            ((2, 2), (2, 2), (0, 0, 0, 0), 0, 0),
            ((3, 3), (1, 1), (1, 1, 1, 1), 0, 0),
            ((3, 3), (2, 2), (1, 1, 1, 1), 1, 0),
            ((3, 2), (2, 3), (0, 0, 0, 0), 0, 1),
        )
    ),
    case("GlobalAveragePool", IMAGE),
    case("GlobalMaxPool", IMAGE),
    *(
        case("Resize", IMAGE, None, None, ints(2, 3, *size), mode=mode, coordinate_transformation_mode=where)
        for size in ((12, 16), (9, 5), (6, 12))
        for mode in ("nearest", "linear", "cubic")
        for where in ("half_pixel", "align_corners", "asymmetric")
    ),
    case("Resize", IMAGE, None, np.array([1, 1, 1.7, 0.6], np.float32), mode="linear"),
    case("Resize", IMAGE, None, np.array([1.7, 2], np.float32), mode="linear", axes=[2, 3]),
    # Normalisations.
    case("BatchNormalization", IMAGE, *(np.array([0.5, 1.0, 2.0]) + n for n in range(4)), epsilon=1e-3),
    case("LayerNormalization", shape(2, 3, 4), shape(4), axis=-1),
    case("LayerNormalization", shape(2, 3, 4), shape(3, 4), axis=1),
    case("InstanceNormalization", IMAGE, np.array([0.5, 1.0, 2.0]), np.array([0.1, 0.2, 0.3])),
    *(case("LpNormalization", shape(2, 3, 4), axis=1, p=p) for p in (1, 2)),
]  # fmt: skip


def name_of(one: Case) -> str:
    return f"{one.op}-{'-'.join(str(key)[:4] + str(value)[:24] for key, value in one.attributes.items())}"


def arrays_of(one: Case, rng) -> list:
    return [
        rng.uniform(one.low, one.high, given)
        if isinstance(given, tuple)
        else given.array
        if isinstance(given, Computed)
        else given
        for given in one.inputs
    ]


def forward_of(one: Case, arrays) -> onnx.ModelProto:
    """A model of the operator alone, whose variable inputs are the model's."""
    names = ["" if array is None else f"x{place}" for place, array in enumerate(arrays)]
    outputs = [f"y{place}" for place in range(one.outputs)]
    variable = {place for place, given in enumerate(one.inputs) if isinstance(given, tuple | Computed)}
    values = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for place, (name, array) in enumerate(zip(names, arrays, strict=True))
        if place in variable
    ]
    constants = [
        onnx.numpy_helper.from_array(np.asarray(array), name)
        for place, (name, array) in enumerate(zip(names, arrays, strict=True))
        if name and place not in variable
    ]
    node = helper.make_node(one.op, names, outputs, **one.attributes)
    results = [helper.make_tensor_value_info(name, DOUBLE, None) for name in outputs]
    if one.op == "TopK":
        results[1] = helper.make_tensor_value_info("y1", onnx.TensorProto.INT64, None)
    graph = helper.make_graph([node], "one", values, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])


def backward_of(one: Case, arrays, outputs) -> onnx.ModelProto:
    """The same model with the gradients of its outputs as inputs, and those of its inputs as outputs."""
    model = ir.from_proto(forward_of(one, arrays))
    AddDefaultAttributesPass()(model)
    graph = model.graph
    values = {value.name: value for value in (*graph.inputs, *graph.initializers.values())}
    shapes = {values[f"x{place}"]: array.shape for place, array in enumerate(arrays) if f"x{place}" in values}
    shapes |= {output: array.shape for output, array in zip(graph.outputs, outputs, strict=True)}
    constants = {value: value.const_value.numpy() for value in graph.initializers.values()}
    known = Known(shapes, constants, ir.DataType.DOUBLE, OPSET)
    count = 1 if one.op == "TopK" else one.outputs
    seeds = {output: ir.Value(name=f"g{place}") for place, output in enumerate(list(graph.outputs)[:count])}
    for seed, array in zip(seeds.values(), outputs, strict=False):
        seed.type, seed.shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape(array.shape)
    by = [values[f"x{place}"] for place in one.by]
    backward = differentiate(list(graph), seeds, by, known)
    graph.inputs.extend(seeds.values())
    graph.extend(backward.nodes)
    for value in backward.initializers:
        graph.register_initializer(value)
    graph.outputs.clear()
    for place, value in enumerate(by):
        result = backward.gradients[value]
        result.type, result.shape = ir.TensorType(ir.DataType.DOUBLE), ir.Shape(arrays[one.by[place]].shape)
        graph.outputs.append(result)
    return ir.to_proto(model)
