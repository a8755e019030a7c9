"""From bytes to messages: what costs far more to parse than to send is refused before protobuf sees it.

Protobuf makes an element of every byte of a packed field: 16 MB of them take seconds of the event loop, and eight to
sixteen times the memory. So the fields are counted first, by walking over them without unpacking anything. Wire format:
https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from heatlens_server.core.errors import FieldViolation, InvalidArgument

MOST_FIELDS = 10_000
"""Most fields of a message, those of messages within it, elements and unknown ones included. Sensible ones have 100."""

MOST_TEXT_BYTES = 1 << 20
"""Most bytes of all texts of a message: names of models, layers and labels."""

_VARINT, _FIXED64, _LENGTH, _GROUP, _GROUP_END, _FIXED32 = range(6)


def tolerant(parse: Any) -> Callable[[bytes], Any]:  # noqa: ANN401 - protobuf's types say less
    """A parser that returns its error, so that the handler can answer it; gRPC itself would say INTERNAL.

    Args:
        parse: `FromString` of the message's class.
    """
    kind = parse.__self__.DESCRIPTOR

    def parse_or_refuse(data: bytes) -> Any:  # noqa: ANN401 - any message
        try:
            _Budget().count(data, 0, len(data), kind)
            return parse(data)
        except InvalidArgument as error:
            return error.with_traceback(None)  # which holds the message
        except (DecodeError, IndexError):
            return _refusal("the message is not valid protobuf", "MESSAGE_UNDECODABLE")

    return parse_or_refuse


def parsed(request: Any) -> Any:  # noqa: ANN401 - any message
    """A request of a parser of `tolerant`. Raises what it returned in place of one."""
    if isinstance(request, InvalidArgument):
        raise request
    return request


class _Budget:
    """What a message may hold still."""

    def __init__(self) -> None:
        self._fields = MOST_FIELDS
        self._text_bytes = MOST_TEXT_BYTES

    def count(self, data: bytes, at: int, end: int, kind: Descriptor) -> None:
        """Count the fields of the message in `data[at:end]`.

        Raises:
            InvalidArgument: there are too many, MESSAGE_TOO_COMPLEX.
            DecodeError, IndexError: it is no message.
        """
        fields = kind.fields_by_number
        while at < end:
            self._take(fields=1)
            tag, at = _varint(data, at)
            wire = tag & 7
            if wire == _LENGTH:
                size, at = _varint(data, at)
                if at + size > end:
                    raise DecodeError("a field ends behind its message")
                self._count_value(data, at, at + size, fields.get(tag >> 3))
                at += size
            elif wire == _VARINT:
                at = _varint(data, at)[1]
            elif wire in (_FIXED64, _FIXED32):
                at += 8 if wire == _FIXED64 else 4
            elif wire not in (_GROUP, _GROUP_END):
                raise DecodeError("no such wire type")

    def _count_value(self, data: bytes, at: int, end: int, field: FieldDescriptor | None) -> None:
        if field is None or field.type == FieldDescriptor.TYPE_BYTES:
            return  # stays as it is, in one piece
        if (inner := field.message_type) is not None:
            self.count(data, at, end, inner)
        elif field.type == FieldDescriptor.TYPE_STRING:
            self._take(text_bytes=end - at)
        else:
            self._take(fields=end - at)  # packed: an element takes a byte at least

    def _take(self, *, fields: int = 0, text_bytes: int = 0) -> None:
        self._fields -= fields
        self._text_bytes -= text_bytes
        if self._fields < 0 or self._text_bytes < 0:
            raise _refusal(
                f"the message has more than {MOST_FIELDS} fields and elements, or more than {MOST_TEXT_BYTES} bytes of "
                "text",
                "MESSAGE_TOO_COMPLEX",
            )


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next begins."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("a number of more than ten bytes")


def _refusal(message: str, reason: str) -> InvalidArgument:
    return InvalidArgument([FieldViolation("", message)], reason=reason)
