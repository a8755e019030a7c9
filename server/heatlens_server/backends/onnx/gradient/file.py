"""From an ONNX file of anybody's to a graph in one form: a recent opset, no functions, no operators that do nothing."""

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner, version_converter
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.checks import OWN_DOMAINS, check_operators, check_proto, sort_nodes
from heatlens_server.backends.onnx.gradient.runtime_operators import rewrite_runtime_operators
from heatlens_server.core.errors import ModelLoadError

OLDEST_OPSET = 20
"""Files of older versions are converted to this one; the rules know it and everything newer."""

_INLINED = frozenset(
    {
        *("Attention", "CastLike", "CenterCropPad", "GroupNormalization", "MeanVarianceNormalization"),
        *("RMSNormalization", "RotaryEmbedding", "SwiGLU"),
    }
)
"""Operators that ONNX defines by others: these are differentiated in their place."""

_SMALL_BYTES = 1024
"""Constants up to this size are looked at, such as axes and sizes; larger ones are weights."""

_FLOAT = ir.DataType.FLOAT
_FLOATS = frozenset({_FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


FILE_BESIDE = "file"
"""Where a weight's `meta` has the path of the file beside the graph's that it was read from."""


def read_file(path: Path) -> ir.Model:
    """Read a file, check it, and bring its graph into the form that rules know.

    Weights are in memory then: what is written to the file, or to files beside it, later changes nothing.

    Args:
        path: of the file. Weights outside of it must lie in its folder.

    Returns:
        A model whose nodes are sorted and have all attributes; opset >= OLDEST_OPSET; no control flow, no operators of
        other domains, no functions.

    Raises:
        ModelLoadError: it is no such file; names the operator or value, and no path.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelLoadError(f"{path.name!r} cannot be read ({type(error).__name__})") from error
    # protobuf's error of decoding, which is in protobuf's own package.
    except Exception as error:
        raise ModelLoadError(f"{path.name!r} is no ONNX file") from error
    if not proto.graph.node:
        raise ModelLoadError(f"{path.name!r} has no operators")
    check_proto(proto, path)
    try:
        weights = _take_weights(proto, path.parent)
        # Of the same kind as a new message: protobuf keeps all of a file for any part of it.
        model = with_weights(_in_newest_form(onnx.ModelProto.FromString(proto.SerializeToString())), weights)
        rewrite_runtime_operators(model)
        return _in_one_form(model, _dtype_of(model))
    except ModelLoadError:
        raise
    # The parsers raise whatever they meet in a file that is wrong; what is in C++ has classes that are not public.
    except Exception as error:
        raise ModelLoadError(f"{path.name!r} is no valid ONNX file ({type(error).__name__})") from error


def _take_weights(proto: onnx.ModelProto, folder: Path) -> dict[str, ir.TensorProtocol]:
    """Take the weights out of a file, which become inputs of its graph. All small constants become initialisers."""
    graph = proto.graph
    nodes = []
    constants = [*graph.initializer]
    for node in graph.node:
        tensor = _constant(node)
        nodes += [node] if tensor is None else []
        constants += [] if tensor is None else [tensor]
    names: set[str] = set()
    for tensor in constants:
        if tensor.name in names:
            raise ModelLoadError(f"tensor {tensor.name!r} is there twice")
        names.add(tensor.name)
    weights: dict[str, ir.TensorProtocol] = {}
    inputs, small = [one for one in graph.input if one.name not in names], []
    for tensor in constants:
        read = ir.serde.deserialize_tensor(tensor, str(folder))
        is_outside = isinstance(read, ir.ExternalTensor)
        if read.nbytes > _SMALL_BYTES:
            # A tensor outside is mapped from its file.
            values = read.numpy().copy() if is_outside else read.numpy()
            weights[tensor.name] = ir.Tensor(values, dtype=read.dtype, name=tensor.name)
            if isinstance(read, ir.ExternalTensor):
                weights[tensor.name].meta[FILE_BESIDE] = Path(read.path)
            inputs.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        elif is_outside:
            small.append(onnx.numpy_helper.from_array(read.numpy(), tensor.name))
        else:
            small.append(tensor)
    graph_of_rest = onnx.GraphProto(node=nodes, initializer=small, input=inputs)
    for name in ("node", "initializer", "input"):
        graph.ClearField(name)
    graph.MergeFrom(graph_of_rest)
    return weights


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant holds, under the name of its output; None of another operator, or if it holds text."""
    if node.op_type != "Constant" or node.domain not in OWN_DOMAINS or len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    if attribute.name == "value":
        tensor = onnx.TensorProto()
        tensor.CopyFrom(attribute.t)
    elif attribute.name in {"value_float", "value_floats"}:
        floats = attribute.f if attribute.name == "value_float" else attribute.floats
        tensor = onnx.numpy_helper.from_array(np.array(floats, np.float32))
    elif attribute.name in {"value_int", "value_ints"}:
        ints = attribute.i if attribute.name == "value_int" else attribute.ints
        tensor = onnx.numpy_helper.from_array(np.array(ints, np.int64))
    else:
        return None
    tensor.name = node.output[0]
    return tensor


def skeleton_of(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A model without its weights, which become inputs, and without what its outputs do not depend on; the weights.

    Kilobytes instead of the file's size: what reads graphs only, such as the inference of shapes, takes this.
    """
    copy = model.clone()
    common.RemoveUnusedNodesPass()(copy)
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _SMALL_BYTES:
            continue
        weights[name] = tensor
        del copy.graph.initializers[name]
        value.const_value = None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        if value not in copy.graph.inputs:
            copy.graph.inputs.append(value)
    return ir.to_proto(copy), weights


def with_weights(skeleton: onnx.ModelProto, weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    """The inverse of `skeleton_of`."""
    model = ir.from_proto(skeleton)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            model.graph.register_initializer(value)
    return model


def _in_newest_form(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of a recent opset whose nodes are sorted, and none of which is a function.

    Raises:
        ModelLoadError: the graph is none, or an operator cannot be converted; names it.
    """
    sort_nodes(skeleton.graph)
    opset = next(one.version for one in skeleton.opset_import if one.domain in OWN_DOMAINS)
    if skeleton.functions:
        _say_defaults(skeleton)
        skeleton = inliner.inline_local_functions(skeleton)
        check_operators(skeleton.graph.node, opset)
    if opset < OLDEST_OPSET:
        floored = _resized_from_corners(skeleton.graph, opset)
        try:
            skeleton = version_converter.convert_version(skeleton, OLDEST_OPSET)
        # In C++, of an error class that is not public; its message ends in the operator.
        except Exception as error:
            operator = re.search(r"for (\w+)$", str(error))
            about = f"operator {operator[1]}" if operator else f"its graph ({type(error).__name__})"
            raise ModelLoadError(f"{about} cannot be converted from opset {opset} to {OLDEST_OPSET}") from error
        for node in skeleton.graph.node:
            if node.output[0] in floored:
                node.attribute.append(onnx.helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
                node.attribute.append(onnx.helper.make_attribute("nearest_mode", "floor"))
    skeleton = _inlined(skeleton)
    check_operators(skeleton.graph.node, max(opset, OLDEST_OPSET))
    return skeleton


def _say_defaults(skeleton: onnx.ModelProto) -> None:
    """Write the default attributes of functions where these are called: onnx's inliner leaves them out."""
    defaults = {(function.domain, function.name): function.attribute_proto for function in skeleton.functions}
    for nodes in (skeleton.graph.node, *(function.node for function in skeleton.functions)):
        for node in nodes:
            said = {attribute.name for attribute in node.attribute}
            node.attribute.extend(
                attribute for attribute in defaults.get((node.domain, node.op_type), ()) if attribute.name not in said
            )


def in_known_form(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """Bring a graph that was made by torch's exporter into the form that rules know, without writing it to a file.

    Args:
        model: used up.
        dtype: FLOAT, or FLOAT16 to compute in that.
    """
    skeleton, weights = skeleton_of(model)
    return _in_one_form(with_weights(_in_newest_form(skeleton), weights), dtype)


def _in_one_form(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """Constants as initialisers, all attributes written down, one type of numbers, no operator that does nothing."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.AddDefaultAttributesPass()(model)
    _in_one_type(model, dtype)
    _pass_by(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def _resized_from_corners(graph: onnx.GraphProto, opset: int) -> set[str]:
    """The outputs of Upsample, and of Resize before opset 11, whose places onnx's converter changes to half pixels."""
    resizing = {"Resize", "Upsample"} if opset < 11 else set()
    return {node.output[0] for node in graph.node if node.op_type in resizing}


def _inlined(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """Put what ONNX defines by other operators as these, and what is in these in turn."""
    while found := {node.op_type for node in skeleton.graph.node if node.domain in OWN_DOMAINS} & _INLINED:
        copy = ir.from_proto(skeleton)
        common.AddDefaultAttributesPass()(copy)
        skeleton = ir.to_proto(copy)
        names = [("", name) for name in sorted(found)]
        skeleton = inliner.inline_selected_functions(_with_types(skeleton), names, inline_schema_functions=True)
    return skeleton


def _with_types(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """Say the types of all values: what is inlined depends on them, and files need not say them."""
    for tensor in skeleton.graph.initializer:
        skeleton.graph.value_info.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return onnx.shape_inference.infer_shapes(skeleton)


def _dtype_of(model: ir.Model) -> ir.DataType:
    """What a file is computed in: float32, or float64 if an input has it."""
    return ir.DataType.DOUBLE if any(value.dtype is ir.DataType.DOUBLE for value in model.graph.inputs) else _FLOAT


def _in_one_type(model: ir.Model, kind: ir.DataType) -> None:
    """Compute everything in one type of numbers: rules know one."""
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.dtype in _FLOATS:
            value.type = ir.TensorType(kind)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _FLOATS and tensor.dtype is not kind:
            value.const_value = ir.tensor(tensor.numpy().astype(kind.numpy()), name=value.name)
            value.type = ir.TensorType(kind)
    for node in model.graph:
        for name in ("to", "dtype", "output_dtype", "stash_type", "softmax_precision"):
            # Normalisations compute their means in float32 at least.
            is_mean = name == "stash_type" and kind is ir.DataType.FLOAT16
            if name in node.attributes and node.attributes[name].as_int() in _FLOATS and not is_mean:
                node.attributes[name] = ir.AttrInt64(name, int(kind))
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            filled = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            if ir.DataType.from_numpy(filled.dtype) in _FLOATS:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(filled.astype(kind.numpy())))


def _pass_by(model: ir.Model) -> None:
    """Leave out operators that do nothing when a model is run."""
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        if node.op_type not in {"Dropout", "Identity"} or node.outputs[0] in outputs:
            continue
        if (len(node.outputs) > 1 and node.outputs[1].uses()) or _is_random(node):
            continue
        source = node.inputs[0]
        if source is None:
            continue
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)


def _is_random(node: ir.Node) -> bool:
    """Whether a Dropout may be in training mode, in which it drops values."""
    training = node.inputs[2] if node.op_type == "Dropout" and len(node.inputs) > 2 else None
    return training is not None and (training.const_value is None or bool(training.const_value.numpy().any()))
