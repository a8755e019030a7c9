"""The boxes of HEIF files, AVIF and HEIC: the items that a decoder goes through for the primary image.

ISO/IEC 14496-12 has the boxes, ISO/IEC 23008-12 the items and their properties.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from heatlens_server.imaging.limits import TRUNCATED, Malformed, TooComplex, check_parts
from heatlens_server.imaging.walk.coded import av1_frames, hevc_frames
from heatlens_server.imaging.walk.plain import PlainFile, SizeCheck

_SAMPLES_OF_PIXEL = 8
"""A pixel of AV1 or HEVC takes as long as eight samples of other formats."""

_DEEPEST = 4
_AV1, _HEVC = b"av01", b"hvc1"
_DERIVED = frozenset({b"grid", b"iden", b"iovl"})
# Brands of sequences; a file of these has a still image as well, or is not read.
_STILL_BRANDS = {b"avis": b"avif", b"msf1": b"mif1", b"hevc": b"heic", b"hevx": b"heix"}


@dataclass(slots=True)
class _Meta:
    """What a file's meta box says of its items, by their ids."""

    primary: int = 0
    kinds: dict[int, bytes] = field(default_factory=dict)
    exif_at: list[int] = field(default_factory=list)
    properties: list[tuple[bytes, bytes]] = field(default_factory=list)
    property_numbers: dict[int, list[int]] = field(default_factory=dict)
    extents: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    references: list[tuple[bytes, int, list[int]]] = field(default_factory=list)
    own_data_at: int = 0


class _Reader:
    """Reads numbers of a file one after the other. Raises Malformed beyond its end."""

    def __init__(self, encoded: bytes, at: int, end: int) -> None:
        self._encoded = encoded
        self.at = at
        self.end = end

    def number(self, size: int) -> int:
        self.at += size
        if self.at > self.end:
            raise Malformed(TRUNCATED)
        return int.from_bytes(self._encoded[self.at - size : self.at], "big")

    def numbers(self, size: int, count: int) -> list[int]:
        if self.at + size * count > self.end:
            raise Malformed(TRUNCATED)
        return [self.number(size) for _ in range(count)]


class _Boxes:
    """The boxes of a file; counts all that are read."""

    def __init__(self, encoded: bytes) -> None:
        self.encoded = encoded
        self.parts = 0

    def count(self, parts: int = 1) -> None:
        self.parts += parts
        check_parts(self.parts, len(self.encoded), "boxes, items and references")

    def within(self, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """The boxes of a part of the file: type, where the content begins and where it ends."""
        while start + 8 <= end:
            self.count()
            size, head = int.from_bytes(self.encoded[start : start + 4], "big"), 8
            if size == 1:
                size, head = int.from_bytes(self.encoded[start + 8 : start + 16], "big"), 16
            stop = end if size == 0 else start + size
            if stop < start + head or stop > end:
                raise Malformed(TRUNCATED)
            yield self.encoded[start + 4 : start + 8], start + head, stop
            start = stop


def is_heif(encoded: bytes) -> bool:
    """Whether a file begins as those of ISO's base media file format do."""
    return encoded[4:8] == b"ftyp"


def walk_heif(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a HEIF file's boxes, and over what is coded in the items of its primary image.

    EXIF is hidden from decoders, which take the orientation from properties of the image; so are sequences.

    Returns:
        The file; its size is that of the primary item before decoders crop it.

    Raises:
        Malformed: it is none, or truncated or corrupt.
        TooComplex: it has too many boxes, items, references or frames.
    """
    boxes = _Boxes(encoded)
    copy = bytearray(encoded)
    meta: _Meta | None = None
    for kind, start, end in boxes.within(0, len(encoded)):
        if kind == b"meta" and meta is None:
            meta = _meta(boxes, start + 4, end)
        elif kind == b"ftyp":
            boxes.count((end - start) // 4)
            for at in range(start, end - 3, 4):
                copy[at : at + 4] = _STILL_BRANDS.get(encoded[at : at + 4], encoded[at : at + 4])
        elif kind == b"moov":
            at = encoded.rindex(kind, 0, start)
            copy[at : at + 4] = b"free"
    if meta is None or meta.primary not in meta.kinds:
        raise Malformed("the file holds no still image")
    for at in meta.exif_at:
        copy[at : at + 4] = b"none"
    width_px, height_px = _size(meta, meta.primary)
    check(width_px, height_px)
    shown = _shown(meta, meta.primary, boxes)
    seen = {meta.primary, *shown}
    for kind, item, targets in meta.references:
        if kind == b"auxl" and not seen.isdisjoint(targets):  # its alpha channel, say
            shown += _shown(meta, item, boxes)
    # Tiles may be shown again and again; each is looked at once.
    coded = {item: _coded_pixels(meta, item, boxes, check) for item in dict.fromkeys(shown)}
    pixels = sum(coded[item] for item in shown)
    name = "AVIF" if _AV1 in {meta.kinds.get(item) for item in shown} else "HEIF"
    return PlainFile(
        name,
        width_px,
        height_px,
        bytes(copy),
        decoded_bytes=12 * width_px * height_px,
        samples=_SAMPLES_OF_PIXEL * pixels,
    )


def _meta(boxes: _Boxes, start: int, end: int) -> _Meta:
    meta = _Meta()
    locations: tuple[int, int] | None = None
    for kind, at, stop in boxes.within(start, end):
        reader = _Reader(boxes.encoded, at, stop)
        if kind == b"pitm":
            meta.primary = _primary(reader)
        elif kind == b"iinf":
            _read_items(meta, boxes, reader)
        elif kind == b"iprp":
            _read_properties(meta, boxes, at, stop)
        elif kind == b"iref":
            _read_references(meta, boxes, at, stop)
        elif kind == b"iloc":
            locations = (at, stop)
        elif kind == b"idat":
            meta.own_data_at = at
    if locations is not None:
        _read_locations(meta, boxes, _Reader(boxes.encoded, *locations))
    return meta


def _primary(reader: _Reader) -> int:
    version = reader.number(4) >> 24
    return reader.number(2 if version == 0 else 4)


def _read_items(meta: _Meta, boxes: _Boxes, reader: _Reader) -> None:
    version = reader.number(4) >> 24
    reader.number(2 if version == 0 else 4)
    for kind, at, stop in boxes.within(reader.at, reader.end):
        if kind != b"infe":
            continue
        entry = _Reader(boxes.encoded, at, stop)
        version = entry.number(4) >> 24
        if version < 2:
            continue
        item = entry.number(2 if version == 2 else 4)
        entry.number(2)
        meta.kinds[item] = entry.number(4).to_bytes(4, "big")
        if meta.kinds[item] == b"Exif":
            meta.exif_at.append(entry.at - 4)


def _read_properties(meta: _Meta, boxes: _Boxes, start: int, end: int) -> None:
    for kind, at, stop in boxes.within(start, end):
        if kind == b"ipco":
            meta.properties = [(name, boxes.encoded[a:b]) for name, a, b in boxes.within(at, stop)]
        elif kind == b"ipma":
            reader = _Reader(boxes.encoded, at, stop)
            head = reader.number(4)
            size, essential = (2, 0x7FFF) if head & 1 else (1, 0x7F)
            for _ in range(reader.number(4)):
                item = reader.number(2 if head >> 24 == 0 else 4)
                count = reader.number(1)
                boxes.count(1 + count)
                numbers = [number & essential for number in reader.numbers(size, count)]
                meta.property_numbers.setdefault(item, []).extend(numbers)


def _read_references(meta: _Meta, boxes: _Boxes, start: int, end: int) -> None:
    size = 2 if _Reader(boxes.encoded, start, end).number(4) >> 24 == 0 else 4
    for kind, at, stop in boxes.within(start + 4, end):
        reader = _Reader(boxes.encoded, at, stop)
        item, count = reader.number(size), reader.number(2)
        boxes.count(count)
        meta.references.append((kind, item, reader.numbers(size, count)))


def _read_locations(meta: _Meta, boxes: _Boxes, reader: _Reader) -> None:
    version = reader.number(4) >> 24
    sizes = reader.number(2)
    offset_size, length_size, base_size, index_size = (sizes >> shift & 15 for shift in (12, 8, 4, 0))
    held = 0
    for _ in range(reader.number(2 if version < 2 else 4)):
        item = reader.number(2 if version < 2 else 4)
        method = reader.number(2) & 15 if version > 0 else 0
        reader.number(2)
        base, count = reader.number(base_size), reader.number(2)
        boxes.count(1 + count)
        for _ in range(count):
            if version > 0:
                reader.number(index_size)
            offset, length = base + reader.number(offset_size), reader.number(length_size)
            offset += meta.own_data_at if method == 1 else 0
            end = offset + length if length else len(boxes.encoded)
            held += max(0, end - offset)
            meta.extents.setdefault(item, []).append((offset, end))
    if held > len(boxes.encoded):
        raise TooComplex("the items of the file overlap")


def _shown(meta: _Meta, item: int, boxes: _Boxes, depth: int = 0) -> list[int]:
    """The coded items that an item is made of, each as often as it is decoded."""
    if meta.kinds.get(item) not in _DERIVED:
        return [item]
    if depth == _DEEPEST:
        raise TooComplex(f"the image is derived of others over more than {_DEEPEST} steps")
    found: list[int] = []
    for kind, derived, sources in meta.references:
        if kind == b"dimg" and derived == item:
            boxes.count(len(sources))
            for source in sources:
                found += _shown(meta, source, boxes, depth + 1)
                boxes.count(len(found))
    return found


def _coded_pixels(meta: _Meta, item: int, boxes: _Boxes, check: SizeCheck) -> int:
    """The pixels of all frames that are coded in an item."""
    kind = meta.kinds.get(item)
    data = b"".join(boxes.encoded[start:end] for start, end in meta.extents.get(item, []))
    if kind == _AV1:
        frames = av1_frames(data)
    elif kind == _HEVC:
        frames = hevc_frames(_property(meta, item, b"hvcC"), data)
    else:
        raise Malformed("the image is of a coding that is not read")
    boxes.count(frames.parts)
    if frames.count == 0:
        raise Malformed(TRUNCATED)
    told = _size(meta, item)
    check(*told)
    return frames.count * max(frames.width_px * frames.height_px, told[0] * told[1])


def _size(meta: _Meta, item: int) -> tuple[int, int]:
    extents = _property(meta, item, b"ispe")
    if len(extents) < 12:
        raise Malformed(TRUNCATED)
    return int.from_bytes(extents[4:8], "big"), int.from_bytes(extents[8:12], "big")


def _property(meta: _Meta, item: int, kind: bytes) -> bytes:
    numbers = meta.property_numbers.get(item, [])
    found = (meta.properties[number - 1] for number in numbers if 0 < number <= len(meta.properties))
    return next((content for name, content in found if name == kind), b"")
