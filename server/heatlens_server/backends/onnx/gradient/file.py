"""From an ONNX file of anybody's to a graph in one form: a recent opset, no functions, no operators that do nothing."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import inliner, version_converter
from onnx_ir.passes import common

from heatlens_server.backends.onnx.gradient.runtime_operators import is_rewritten, rewrite_runtime_operators
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

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_OWN_DOMAINS = frozenset({"", "ai.onnx"})


def read_file(path: Path) -> ir.Model:
    """Read a file, check it, and bring its graph into the form that rules know.

    Weights stay where they are until they are read: in the file's bytes, or mapped from files beside it.

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
    _check_tensors(proto, path)
    try:
        model = ir.from_proto(proto)
        common.InlinePass()(model)
        _check_operators(model)
    except ModelLoadError:
        raise
    # The parser raises whatever it meets in a file that is wrong.
    except Exception as error:
        raise ModelLoadError(f"{path.name!r} is no valid ONNX file ({type(error).__name__})") from error
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value.base_dir = str(path.parent)
            if value.const_value.nbytes <= _SMALL_BYTES:
                # Graphs without their weights keep these.
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    return _in_one_form(model, path.name)


def skeleton_of(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """A model without its weights, which become inputs, and the weights by name. The model stays as it is.

    Kilobytes instead of the file's size: what reads graphs only, such as the inference of shapes, takes this.
    """
    copy = model.clone()
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


def _check_tensors(proto: onnx.ModelProto, path: Path) -> None:
    """Check that every tensor is as long as it says, before anything is made of it.

    Raises:
        ModelLoadError: one is not, or lies outside of the file's folder.
    """
    folder = path.parent.resolve()
    attributes = (attribute.t for node in proto.graph.node for attribute in node.attribute if attribute.HasField("t"))
    for tensor in (*proto.graph.initializer, *attributes):
        count = 1
        for length in tensor.dims:
            if length < 0:
                raise ModelLoadError(f"{path.name!r}: tensor {tensor.name!r} has a negative length")
            count *= length
        size_bytes = (count * ir.DataType(tensor.data_type).bitwidth + 7) // 8 if tensor.data_type else 0
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, folder, size_bytes, path.name)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != size_bytes:
            raise ModelLoadError(
                f"{path.name!r}: tensor {tensor.name!r} says {size_bytes} bytes and has {len(tensor.raw_data)}"
            )


def _check_external(tensor: onnx.TensorProto, folder: Path, size_bytes: int, file_name: str) -> None:
    stored = {entry.key: entry.value for entry in tensor.external_data}
    place = (folder / stored.get("location", "")).resolve()
    if not place.is_relative_to(folder):
        raise ModelLoadError(f"{file_name!r}: tensor {tensor.name!r} lies outside of the file's folder")
    try:
        available = place.stat().st_size - int(stored.get("offset", 0))
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file_name!r}: the data of tensor {tensor.name!r} cannot be read") from error
    if not place.is_file() or int(stored.get("offset", 0)) < 0 or available < size_bytes:
        raise ModelLoadError(f"{file_name!r}: the file that holds tensor {tensor.name!r} is too short")


def _check_operators(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in _CONTROL_FLOW:
            raise ModelLoadError(
                f"operator {node.op_type} of node {node.name!r}: control flow cannot be differentiated"
            )
        if node.domain not in _OWN_DOMAINS and not is_rewritten(node):
            raise ModelLoadError(
                f"operator {node.domain}.{node.op_type} of node {node.name!r} is not ONNX's own: "
                "give the file before a runtime optimised it"
            )


def _in_one_form(model: ir.Model, file_name: str) -> ir.Model:
    common.RemoveInitializersFromInputsPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    if len(model.graph) == 0:
        raise ModelLoadError(f"{file_name!r} has no operators")
    floored = _resized_from_corners(model)
    try:
        skeleton, weights = skeleton_of(model)
        # protobuf copies a tensor's bytes whenever they are asked for, and keeps all of a file for any part of it.
        weights = {name: _read(tensor) for name, tensor in weights.items()}
        if model.graph.opset_imports.get("", 0) < OLDEST_OPSET:
            skeleton = version_converter.convert_version(skeleton, OLDEST_OPSET)
        model = with_weights(_inlined(skeleton), weights)
        common.TopologicalSortPass()(model)
        rewrite_runtime_operators(model)
    except ModelLoadError:
        raise
    # In C++, of an error class that is not public.
    except Exception as error:
        raise ModelLoadError(f"{file_name!r} cannot be converted to opset {OLDEST_OPSET}: {error}") from error
    _check_operators(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in model.graph:
        if node.outputs[0].name in floored:
            node.attributes["coordinate_transformation_mode"] = ir.AttrString(
                "coordinate_transformation_mode", "asymmetric"
            )
            node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "floor")
    common.AddDefaultAttributesPass()(model)
    _in_one_type(model)
    _pass_by(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def _resized_from_corners(model: ir.Model) -> set[str | None]:
    """The outputs of Upsample, and of Resize before opset 11, whose places onnx's converter changes to half pixels."""
    if model.graph.opset_imports.get("", 0) >= 11:
        return set()
    return {node.outputs[0].name for node in model.graph if node.op_type in {"Resize", "Upsample"}}


def _inlined(skeleton: onnx.ModelProto) -> onnx.ModelProto:
    """Put what ONNX defines by other operators as these, and what is in these in turn."""
    while found := {node.op_type for node in skeleton.graph.node if node.domain in _OWN_DOMAINS} & _INLINED:
        copy = ir.from_proto(skeleton)
        common.AddDefaultAttributesPass()(copy)
        skeleton = ir.to_proto(copy)
        # The definitions depend on types, which files need not say.
        for tensor in skeleton.graph.initializer:
            skeleton.graph.value_info.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        skeleton = onnx.shape_inference.infer_shapes(skeleton)
        names = [("", name) for name in sorted(found)]
        skeleton = inliner.inline_selected_functions(skeleton, names, inline_schema_functions=True)
    return skeleton


def _in_one_type(model: ir.Model) -> None:
    """Compute everything in float32, or in float64 if an input has it: rules know one type of numbers."""
    kind = ir.DataType.DOUBLE if any(value.dtype is ir.DataType.DOUBLE for value in model.graph.inputs) else _FLOAT
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
            if name in node.attributes and ir.DataType(node.attributes[name].as_int()) in _FLOATS:
                node.attributes[name] = ir.AttrInt64(name, int(kind))
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            filled = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            if ir.DataType.from_numpy(filled.dtype) in _FLOATS:
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(filled.astype(kind.numpy())))


def _read(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return tensor if isinstance(tensor, ir.ExternalTensor) else ir.Tensor(tensor.numpy(), name=tensor.name)


def _pass_by(model: ir.Model) -> None:
    """Leave out operators that do nothing when a model is run."""
    outputs = set(model.graph.outputs)
    for node in list(model.graph):
        if node.op_type not in {"Dropout", "Identity"} or node.outputs[0] in outputs:
            continue
        if len(node.outputs) > 1 and node.outputs[1].uses():
            continue
        source = node.inputs[0]
        if source is None:
            continue
        node.outputs[0].replace_all_uses_with(source)
        model.graph.remove(node, safe=True)
