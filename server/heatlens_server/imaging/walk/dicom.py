"""The elements of DICOM files (PS3.5, 7): those that tell of pixels are kept, all others left out."""

from collections.abc import Iterator

from heatlens_server.imaging.limits import Malformed, TooComplex
from heatlens_server.imaging.walk.jpeg import walk_jpeg
from heatlens_server.imaging.walk.jpeg2000 import walk_jpeg2000
from heatlens_server.imaging.walk.plain import PlainFile, SizeCheck

MAX_ELEMENTS = 20_000
"""Most elements and fragments: files of many frames have some dozens for each."""

MAX_VALUE_BYTES = 1 << 10
"""Largest element that describes the pixels: pydicom makes an object of each of its values."""

MAX_TABLE_BYTES = 1 << 18
"""Largest table: it has 65,536 entries of two bytes."""

MAX_TABLE_ELEMENTS = 32
"""Most elements and items of the sequence that holds a table."""

_MARK, _MARK_AT = b"DICM", 128
_JPEG, _JPEG_2000, _JPEG_2000_LOSSLESS = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.91", "1.2.840.10008.1.2.4.90"
_COMPRESSED = {_JPEG: walk_jpeg, _JPEG_2000: walk_jpeg2000, _JPEG_2000_LOSSLESS: walk_jpeg2000}
_IMPLICIT, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2"
# Deflated ones are left out, and those of run lengths: pydicom unpacks them whole, whatever size they say.
_TRANSFER_SYNTAXES = {
    _IMPLICIT: "Implicit VR Little Endian",
    "1.2.840.10008.1.2.1": "Explicit VR Little Endian",
    _BIG_ENDIAN: "Explicit VR Big Endian",
    _JPEG: "JPEG Baseline",
    _JPEG_2000_LOSSLESS: "JPEG 2000 Lossless",
    _JPEG_2000: "JPEG 2000",
}
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
_META = 0x0002
_SYNTAX, _PIXELS = (0x0002, 0x0010), (0x7FE0, 0x0010)
_FRAMES, _SAMPLES, _ROWS, _COLUMNS, _BITS = ((0x0028, number) for number in (0x08, 0x02, 0x10, 0x11, 0x100))
_NUMBERS = frozenset({_SAMPLES, _ROWS, _COLUMNS, _BITS})
_COLORS, _MODALITY_TABLE = (0x0028, 0x0004), (0x0028, 0x3000)
_TABLES = frozenset({(0x0028, 0x1201), (0x0028, 0x1202), (0x0028, 0x1203), _MODALITY_TABLE})
# Planes, frames, bits, window, rescaling, tables of colours. Tables in segments (0028,1221) are left out: those of some
# kilobytes unpack to gigabytes. So are tables of offsets, as the first frame alone is kept.
_KEPT = (
    _NUMBERS
    | _TABLES
    | {_FRAMES, _COLORS, _PIXELS, (0x7FE0, 0x0008), (0x7FE0, 0x0009)}
    | {(0x0028, number) for number in (0x06, 0x101, 0x102, 0x103, *range(0x1050, 0x1057), 0x1101, 0x1102, 0x1103)}
)
_ITEM, _ITEM_END, _SEQUENCE_END = (0xFFFE, 0xE000), (0xFFFE, 0xE00D), (0xFFFE, 0xE0DD)
_MARKS = frozenset({_ITEM, _ITEM_END, _SEQUENCE_END})
_UNDEFINED = 0xFFFFFFFF
_DEEPEST = 32
_BROKEN = "the DICOM file is truncated or corrupt, or holds no image"

_Tag = tuple[int, int]


class _Elements:
    """Reads elements of one transfer syntax; counts all that are read."""

    def __init__(self, encoded: bytes) -> None:
        self._encoded = encoded
        self._order = "little"
        self._is_implicit = False
        self._count = 0

    def follow(self, syntax: str) -> None:
        """What follows is of this transfer syntax."""
        self._order = "big" if syntax == _BIG_ENDIAN else "little"
        self._is_implicit = syntax == _IMPLICIT

    def number(self, start: int, end: int) -> int:
        """The number that some bytes are."""
        return int.from_bytes(self._encoded[start:end], "big" if self._order == "big" else "little")

    def head(self, at: int, *, implicit: bool | None = None) -> tuple[_Tag, int, int, bool]:
        """An element's tag, where its value begins, how long that is, and whether what is in it has no types."""
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise TooComplex(f"the DICOM file has more than {MAX_ELEMENTS} elements and fragments")
        if at + 8 > len(self._encoded):
            raise Malformed(_BROKEN)
        tag = (self.number(at, at + 2), self.number(at + 2, at + 4))
        is_implicit = self._is_implicit if implicit is None else implicit
        if tag[0] == _ITEM[0] or is_implicit:
            return tag, at + 8, self.number(at + 4, at + 8), is_implicit
        kind = self._encoded[at + 4 : at + 6]
        if kind in _LONG:
            return tag, at + 12, self.number(at + 8, at + 12), kind == b"UN"
        return tag, at + 8, self.number(at + 6, at + 8), False

    def end(self, start: int, length: int, *, implicit: bool, depth: int = 0) -> int:
        """Where a value ends; of undefined length, behind the end of its sequence."""
        if length != _UNDEFINED:
            if start + length > len(self._encoded):
                raise Malformed(_BROKEN)
            return start + length
        if depth == _DEEPEST:
            raise TooComplex(f"the DICOM file has sequences within sequences, more than {_DEEPEST} deep")
        at = start
        while True:
            tag, at, size, _ = self.head(at, implicit=implicit)
            if tag == _SEQUENCE_END:
                return at
            if tag != _ITEM:
                raise Malformed(_BROKEN)
            at = self._item_end(at, size, implicit=implicit, depth=depth)

    def _item_end(self, at: int, size: int, *, implicit: bool, depth: int) -> int:
        if size != _UNDEFINED:
            return at + size
        while True:
            tag, at, size, is_implicit = self.head(at, implicit=implicit or None)
            if tag == _ITEM_END:
                return at
            at = self.end(at, size, implicit=implicit or is_implicit, depth=depth + 1)

    def check_sequence(self, at: int, end: int, *, implicit: bool) -> None:
        """Refuse a sequence of many elements or items: pydicom makes objects of them all for the first."""
        for _ in range(MAX_TABLE_ELEMENTS):
            if at >= end:
                return
            tag, at, size, untyped = self.head(at, implicit=implicit or None)
            if tag not in _MARKS:
                at = self.end(at, size, implicit=implicit or untyped)
        raise TooComplex(f"a table of the DICOM file has more than {MAX_TABLE_ELEMENTS} elements")

    def fragments(self, start: int) -> Iterator[bytes]:
        """The items of encapsulated pixels, the table of offsets first: PS3.5, A.4."""
        at = start
        while True:
            tag, at, size, _ = self.head(at)
            if tag == _SEQUENCE_END:
                return
            if tag != _ITEM or at + size > len(self._encoded):
                raise Malformed(_BROKEN)
            yield self._encoded[at : at + size]
            at += size


def is_dicom(encoded: bytes) -> bool:
    """Whether a file is DICOM, with its preamble."""
    return encoded[_MARK_AT : _MARK_AT + len(_MARK)] == _MARK


def walk_dicom(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a DICOM file's elements, and keep its pixels, or their first frame if compressed, and what they are.

    Raises:
        Malformed: it is truncated, or of a transfer syntax that is not read.
        TooComplex: it has too many elements or fragments, or a description that is too long.
    """
    elements = _Elements(encoded)
    kept: dict[_Tag, bytes] = {}
    numbers: dict[_Tag, int] = {}
    syntax, at, samples, decoded_bytes = "", _MARK_AT + len(_MARK), 0, 0
    while at < len(encoded):
        if syntax and encoded[at : at + 2] != b"\2\0":
            elements.follow(syntax)
        tag, start, length, implicit = elements.head(at)
        # Readers differ in which of two elements of one name counts.
        if tag in kept or (tag == _PIXELS and (length == _UNDEFINED) != (syntax in _COMPRESSED)):
            raise Malformed(_BROKEN)
        if tag == _PIXELS and length == _UNDEFINED:
            plain = _first_frame(elements, start, syntax, check)
            if (plain.width_px, plain.height_px) != (numbers.get(_COLUMNS), numbers.get(_ROWS)):
                raise Malformed("the DICOM file's frame is of another size than its columns and rows")
            samples, decoded_bytes = plain.samples, plain.decoded_bytes
            # It is the only one now.
            kept.pop(_FRAMES, None)
            kept[tag] = encoded[at:start] + _as_fragment(plain.encoded)
            break
        end = elements.end(start, length, implicit=implicit)
        if tag == _SYNTAX:
            syntax = encoded[start:end].rstrip(b"\0 ").decode("ascii", "replace")
            _check_syntax(syntax)
        if tag in _NUMBERS:
            if end - start != 2:
                raise Malformed(_BROKEN)
            numbers[tag] = elements.number(start, end)
        if tag[0] == _META or tag in _KEPT:
            most = MAX_TABLE_BYTES if tag in _TABLES or tag[0] == _META else MAX_VALUE_BYTES
            if end - start > most and tag[0] != _PIXELS[0]:
                raise TooComplex(f"an element of the DICOM file has more than {most} bytes")
            if tag == _MODALITY_TABLE:
                elements.check_sequence(start, end, implicit=implicit)
            kept[tag] = encoded[at:end]
        at = end
    width_px, height_px = numbers.get(_COLUMNS, 0), numbers.get(_ROWS, 0)
    check(width_px, height_px)
    channels = 3 if b"PALETTE" in kept.get(_COLORS, b"") else max(1, numbers.get(_SAMPLES, 1))
    return PlainFile(
        "DICOM",
        width_px,
        height_px,
        encoded[: _MARK_AT + len(_MARK)] + b"".join(kept.values()),
        # What a decoder holds is free before the values are brought to the model's.
        decoded_bytes=max(decoded_bytes, width_px * height_px * channels * (16 + -(-numbers.get(_BITS, 16) // 8))),
        samples=samples or width_px * height_px * channels,
    )


def _first_frame(elements: _Elements, start: int, syntax: str, check: SizeCheck) -> PlainFile:
    """The first frame of compressed pixels."""
    parts = elements.fragments(start)
    next(parts, b"")
    joined: list[bytes] = []
    begin = b""
    for part in parts:
        if joined and part.startswith(begin):
            break
        joined.append(part)
        begin = begin or part[:3]
    return _COMPRESSED[syntax](b"".join(joined), check)


def _as_fragment(frame: bytes) -> bytes:
    """Encapsulated pixels of one frame: PS3.5, A.4."""
    frame += b"\0" * (len(frame) & 1)
    item, end = bytes.fromhex("feff00e0"), bytes.fromhex("feffdde000000000")
    return item + bytes(4) + item + len(frame).to_bytes(4, "little") + frame + end


def _check_syntax(syntax: str) -> None:
    if syntax not in _TRANSFER_SYNTAXES:
        known = ", ".join(_TRANSFER_SYNTAXES.values())
        raise Malformed(f"the DICOM file's transfer syntax {syntax[:64]} is not read; convert it to one of {known}")
