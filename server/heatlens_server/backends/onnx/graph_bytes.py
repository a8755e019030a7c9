"""Small changes of an ONNX file's bytes: servers lack the package onnx.

The file is one protobuf message, a ModelProto. Numbers of fields are those of onnx.proto, and
https://protobuf.dev/programming-guides/encoding/ describes how messages are written.
"""

from collections.abc import Collection, Iterator

_GRAPH = 7
_INITIALIZER, _OUTPUT = 5, 12
_NAME = 1
_TENSOR_NAME, _RAW_DATA, _DATA_LOCATION = 8, 9, 14
_EXTERNAL = 1
_VARINT, _LENGTH = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}

_Span = tuple[int, int]
"""Where a field's value begins and ends."""


def returning(graph: bytes, names: Collection[str]) -> bytes:
    """The same graph with some of its outputs alone."""
    ((start, end),) = _values(graph, (0, len(graph)), _GRAPH)
    kept, at = bytearray(), start
    for value_start, stop in _values(graph, (start, end), _OUTPUT):
        ((first, last),) = _values(graph, (value_start, stop), _NAME)
        if graph[first:last].decode() not in names:
            kept += graph[at : _field_start(value_start, stop)]
            at = stop
    kept += graph[at:end]
    return graph[: _field_start(start, end)] + _field(_GRAPH, bytes(kept)) + graph[end:]


def external_initializers(graph: bytes) -> list[str]:
    """The names of the initialisers whose data is not in the graph."""
    return [
        graph[start:end].decode()
        for inside in _values(graph, (0, len(graph)), _GRAPH)
        for tensor in _values(graph, inside, _INITIALIZER)
        for place, _ in _values(graph, tensor, _DATA_LOCATION)
        if graph[place] == _EXTERNAL
        for start, end in _values(graph, tensor, _TENSOR_NAME)
    ]


def raw_initializers(graph: bytes) -> dict[str, _Span]:
    """By name, where the data of the initialisers is whose data is in the graph as bytes."""
    found = {}
    for inside in _values(graph, (0, len(graph)), _GRAPH):
        for tensor in _values(graph, inside, _INITIALIZER):
            for span in _values(graph, tensor, _RAW_DATA):
                ((start, end),) = _values(graph, tensor, _TENSOR_NAME)
                found[graph[start:end].decode()] = span
    return found


def _values(data: bytes, span: _Span, wanted: int) -> Iterator[_Span]:
    """The values of a message's fields of one number."""
    start, end = span
    while start < end:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == _VARINT:
            stop = _varint(data, start)[1]
        elif kind == _LENGTH:
            length, start = _varint(data, start)
            stop = start + length
        else:
            stop = start + _FIXED_BYTES[kind]
        if tag >> 3 == wanted:
            yield start, stop
        start = stop


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A number in seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while data[start] > 0x7F:
        value |= (data[start] & 0x7F) << shift
        start, shift = start + 1, shift + 7
    return value | data[start] << shift, start + 1


def _field_start(start: int, end: int) -> int:
    """Where a field begins, with its tag of one byte and its length, whose value is from start to end."""
    return start - len(_written(end - start)) - 1


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _LENGTH, *_written(len(value))]) + value


def _written(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
