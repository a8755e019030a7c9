"""Small changes of an ONNX file's bytes: servers lack the package onnx.

The file is one protobuf message, a ModelProto. Numbers of fields are those of onnx.proto, and
https://protobuf.dev/programming-guides/encoding/ describes how messages are written.
"""

from collections.abc import Iterator, Sequence

_GRAPH = 7
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_NAME, _TYPE, _TENSOR_TYPE, _ELEMENT_TYPE = 1, 2, 1, 1
_TENSOR_NAME, _DATA_LOCATION = 8, 14
_EXTERNAL = 1
_FLOAT = 1
_VARINT, _LENGTH = 0, 2
_FIXED_BYTES = {1: 8, 5: 4}

_Span = tuple[int, int]
"""Where a field's value begins and ends."""


def taking_floats(graph: bytes, name: str) -> bytes:
    """The same graph with an input of float32 in place of another type that is written in one byte, such as uint8."""
    changed = bytearray(graph)
    for inputs in _values(graph, (0, len(graph)), _GRAPH):
        for given in _values(graph, inputs, _INPUT):
            ((start, end),) = _values(graph, given, _NAME)
            if graph[start:end] != name.encode():
                continue
            ((place, _),) = (
                element
                for kind in _values(graph, given, _TYPE)
                for tensor in _values(graph, kind, _TENSOR_TYPE)
                for element in _values(graph, tensor, _ELEMENT_TYPE)
            )
            changed[place] = _FLOAT
    return bytes(changed)


def returning(graph: bytes, names: Sequence[str]) -> bytes:
    """The same graph with further outputs, values of it in float32.

    Where a message that is part of another comes twice, protobuf joins the two: what is added stands at the end.
    """
    element = _field(_TYPE, _field(_TENSOR_TYPE, bytes([_ELEMENT_TYPE << 3 | _VARINT, _FLOAT])))
    outputs = b"".join(_field(_OUTPUT, _field(_NAME, name.encode()) + element) for name in names)
    return graph + _field(_GRAPH, outputs)


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


def _field(number: int, value: bytes) -> bytes:
    length, rest = bytearray(), len(value)
    while rest > 0x7F:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([number << 3 | _LENGTH, *length, rest]) + value
