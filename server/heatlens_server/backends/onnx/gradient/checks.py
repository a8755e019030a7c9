"""What must hold of a file before anything is made of it: its tensors are as long as they say, and its graph is one."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from heatlens_server.backends.onnx.gradient.runtime_operators import is_rewritten
from heatlens_server.core.errors import ModelLoadError

OWN_DOMAINS = frozenset({"", "ai.onnx"})
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})

_MOST_NODES = 1 << 16
"""Of a graph whose functions are inlined."""

_EINSUM_TERM = r"[A-Za-z ]*(\.\.\.)?[A-Za-z ]*"
_EINSUM = re.compile(f"{_EINSUM_TERM}(,{_EINSUM_TERM})*(->{_EINSUM_TERM})?")
"""Of other equations, onnx's inference does not end."""

_DATA = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")


def check_proto(proto: onnx.ModelProto, path: Path) -> None:
    """Check what can be seen without making anything of a file.

    Raises:
        ModelLoadError: it says no opset, or one that this onnx does not know; an operator is not ONNX's own, or runs
            graphs; a tensor is not as long as it says, or lies outside of the file's folder; functions call themselves,
            or have too many nodes. Names the operator, function or tensor.
    """
    opset = next((one.version for one in proto.opset_import if one.domain in OWN_DOMAINS), 0)
    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise ModelLoadError(f"{path.name!r} is of opset {opset}; this onnx knows 1 to {newest}")
    for function in proto.functions:
        # onnx's inliner would leave it as it is, or, asked to convert it, gives several values one name.
        if (other := next((one.version for one in function.opset_import if one.domain in OWN_DOMAINS), opset)) != opset:
            raise ModelLoadError(f"function {function.name!r} is of opset {other}, and {path.name!r} of {opset}")
    functions = {(function.domain, function.name): function.node for function in proto.functions}
    for nodes in (proto.graph.node, *functions.values()):
        check_operators(nodes, opset, functions.keys())
    if _count(proto.graph.node, functions) > _MOST_NODES:
        raise ModelLoadError(f"{path.name!r}: its functions make a graph of more than {_MOST_NODES} nodes")
    for sparse in proto.graph.sparse_initializer:
        raise ModelLoadError(f"{path.name!r}: tensor {sparse.values.name!r} is sparse, which is not understood")
    for tensor in _tensors(proto):
        _check_tensor(tensor, path)


def check_operators(nodes: Iterable[onnx.NodeProto], opset: int, functions: Iterable[tuple[str, str]] = ()) -> None:
    """Check that operators are ONNX's own, or known functions, and run no graphs.

    Raises:
        ModelLoadError: one is not; names it and its node.
    """
    known = set(functions)
    seen: set[str] = set()
    for node in nodes:
        kinds = {attribute.type for attribute in node.attribute}
        about = f"operator {node.op_type} of node {node.name!r}"
        if not any(node.output):
            raise ModelLoadError(f"{about} has no output")
        if node.op_type in _CONTROL_FLOW or kinds & {onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS}:
            raise ModelLoadError(f"{about}: control flow cannot be differentiated")
        if node.domain not in OWN_DOMAINS and (node.domain, node.op_type) not in known and not is_rewritten(node):
            raise ModelLoadError(
                f"operator {node.domain}.{node.op_type} of node {node.name!r} is not ONNX's own: "
                "give the file before a runtime optimised it"
            )
        if node.domain in OWN_DOMAINS and node.op_type not in seen and (node.domain, node.op_type) not in known:
            seen.add(node.op_type)
            if not onnx.defs.has(node.op_type, opset, ""):
                raise ModelLoadError(f"{about} is unknown in opset {opset}")
        if node.op_type == "Einsum":
            equation = "".join(attribute.s.decode(errors="replace") for attribute in node.attribute)
            if not _EINSUM.fullmatch(equation):
                raise ModelLoadError(f"{about}: its equation is none")


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes into an order in which they can run.

    Raises:
        ModelLoadError: there is none, or a value is made by nothing, or twice; names the value, and the node.
    """
    makers = _makers(graph)
    readers: dict[int, list[int]] = defaultdict(list)
    missing = [0] * len(graph.node)
    for place, node in enumerate(graph.node):
        for name in node.input:
            if (maker := makers.get(name)) is not None:
                readers[maker].append(place)
                missing[place] += 1
    order = [place for place, count in enumerate(missing) if not count]
    for place in order:
        for reader in readers[place]:
            missing[reader] -= 1
            if not missing[reader]:
                order.append(reader)
    if len(order) < len(missing):
        node = graph.node[next(place for place, count in enumerate(missing) if count)]
        raise ModelLoadError(f"operator {node.op_type} of node {node.name!r} reads what follows from its own output")
    if any(reader < maker for maker, places in readers.items() for reader in places):
        in_order = onnx.GraphProto(node=[graph.node[place] for place in order])
        graph.ClearField("node")
        graph.node.extend(in_order.node)


def _makers(graph: onnx.GraphProto) -> dict[str, int]:
    """The place of the node that makes each value.

    Raises:
        ModelLoadError: a value that is read is made by nothing, or one is made twice; names it.
    """
    given = {"", *(one.name for one in graph.input), *(one.name for one in graph.initializer)}
    makers: dict[str, int] = {}
    for place, node in enumerate(graph.node):
        for name in filter(None, node.output):
            if name in makers or name in given:
                raise ModelLoadError(f"value {name!r}, an output of node {node.name!r}, is made twice")
            makers[name] = place
    for node in graph.node:
        for name in node.input:
            if name not in makers and name not in given:
                raise ModelLoadError(f"value {name!r}, an input of node {node.name!r}, is made by nothing")
    for one in graph.output:
        if one.name not in makers and one.name not in given:
            raise ModelLoadError(f"output {one.name!r} is made by nothing")
    return makers


def _count(nodes: Sequence[onnx.NodeProto], functions: Mapping[tuple[str, str], Sequence[onnx.NodeProto]]) -> int:
    """The nodes of a graph when its functions are inlined.

    Raises:
        ModelLoadError: a function calls itself, directly or by others; names it.
    """
    counts: dict[tuple[str, str], int] = {}
    entered: set[tuple[str, str]] = set()

    def count(body: Sequence[onnx.NodeProto]) -> int:
        return sum(of(key) if (key := (node.domain, node.op_type)) in functions else 1 for node in body)

    def of(key: tuple[str, str]) -> int:
        if key not in counts:
            if key in entered:
                raise ModelLoadError(f"function {key[1]!r} of domain {key[0]!r} calls itself")
            entered.add(key)
            counts[key] = count(functions[key])
        return counts[key]

    try:
        return count(nodes)
    except RecursionError as error:
        raise ModelLoadError("the file's functions are nested too deep") from error


def _tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    for nodes in (proto.graph.node, *(function.node for function in proto.functions)):
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                    raise ModelLoadError(f"operator {node.op_type} of node {node.name!r} holds a sparse tensor")


def _check_tensor(tensor: onnx.TensorProto, path: Path) -> None:
    about = f"{path.name!r}: tensor {tensor.name!r}"
    if min(tensor.dims, default=0) < 0:
        raise ModelLoadError(f"{about} has a negative length")
    try:
        kind = ir.DataType(tensor.data_type)
        width = 8 if kind is ir.DataType.STRING else kind.bitwidth
    # Of a number that is no type, or of a type without elements.
    except (ValueError, TypeError) as error:
        raise ModelLoadError(f"{about} is of unknown type {tensor.data_type}") from error
    count = math.prod(tensor.dims)
    size_bytes = (count * width + 7) // 8
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_external(tensor, path.parent.resolve(), size_bytes, about)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != size_bytes:
            raise ModelLoadError(f"{about} says {size_bytes} bytes and has {len(tensor.raw_data)}")
    else:
        # Numbers of less than 8 bits are packed, complex ones are two each.
        said = size_bytes if width < 8 else count * (1 + (kind in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}))
        stored = max(len(getattr(tensor, name)) for name in _DATA)
        if stored != said:
            raise ModelLoadError(f"{about} says {said} elements and has {stored}")


def _check_external(tensor: onnx.TensorProto, folder: Path, size_bytes: int, about: str) -> None:
    stored = {entry.key: entry.value for entry in tensor.external_data}
    place = (folder / stored.get("location", "")).resolve()
    if not place.is_relative_to(folder):
        raise ModelLoadError(f"{about} lies outside of the file's folder")
    try:
        offset, length = int(stored.get("offset", 0)), int(stored.get("length", size_bytes))
        available = place.stat().st_size - offset
    except (OSError, ValueError) as error:
        reason = f"{place.name!r} ({type(error).__name__})"
        # An error of the system's names its whole path.
        raise ModelLoadError(f"{about}: its data cannot be read: {reason}") from None
    if not place.is_file() or offset < 0 or length != size_bytes or available < size_bytes:
        raise ModelLoadError(f"{about}: the file that holds it is too short")
