"""The directories of TIFF files (TIFF 6.0; BigTIFF): tags that tell of pixels are kept, all others left out."""

import struct
from dataclasses import dataclass

from heatlens_server.imaging.limits import Malformed, TooComplex, check_parts
from heatlens_server.imaging.orientation import ORIENTATION
from heatlens_server.imaging.walk.jpeg import walk_jpeg
from heatlens_server.imaging.walk.plain import PlainFile, SizeCheck

# Byte order and version, of TIFF and BigTIFF.
SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

MAX_STRIPS = 1 << 16
"""Most strips or tiles of a page: a page may have one per row."""

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES = 256, 257, 258, 259, 277
_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES = 273, 279, 324, 325
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
_JPEG = 7
_SEGMENTS = 16
"""Of a strip of JPEG that has all tables of its own, and its start and end."""

# Photometric interpretation, fill order, rows per strip, smallest and largest value, planes, options of fax codes,
# predictor, colour map, size of tiles, inks, alpha, sample format, JPEG's tables, YCbCr, depth.
_KEPT = frozenset(
    {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES}
    | {ORIENTATION, 262, 266, 278, 280, 281, 284, 292, 293, 317, 320, 322, 323, 332, 338, 339, 340, 341, 347}
    | {529, 530, 531, 532, 32997, 32998}
)
_COMPRESSIONS = {
    1: "none",
    2: "CCITT RLE",
    3: "CCITT G3",
    4: "CCITT G4",
    5: "LZW",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "ZSTD",
    50001: "WebP",
}
# Bytes and format of the types whose values are read here: BYTE, SHORT, LONG, LONG8.
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
# A colour map of 16 bits has three times 65,536 values; JPEG's tables are bytes.
_COLOR_MAP, _JPEG_TABLES = 320, 347
_MOST_VALUES = {_COLOR_MAP: 3 << 16, _JPEG_TABLES: 1 << 16}
_MOST_OTHER_VALUES = 4096
_PARTS = frozenset({_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES})


@dataclass(frozen=True, slots=True)
class _Form:
    """How a TIFF or a BigTIFF writes its directories."""

    order: str
    is_big: bool

    def number(self, encoded: bytes | bytearray, start: int, kind: str) -> int:
        """Read a number of the struct module's kind.

        Raises:
            Malformed: the file ends before.
        """
        try:
            return int(struct.unpack_from(self.order + kind, encoded, start)[0])
        except struct.error as error:
            raise Malformed(_BROKEN) from error

    @property
    def offset(self) -> str:
        """The kind of an offset."""
        return "Q" if self.is_big else "I"


_BROKEN = "the TIFF file is truncated, corrupt or of a kind that is not read"


def walk_tiff(encoded: bytes, check: SizeCheck, *, pages: int) -> PlainFile:
    """Walk over the directories of a TIFF's first pages, and make a copy whose directories hold nothing but pixels.

    Args:
        encoded: the file.
        check: of the size.
        pages: how many directories are kept: the first one, and those that follow it.

    Returns:
        The file, of the size of its first page.

    Raises:
        Malformed: it is none, truncated, or of a compression that is not read.
        TooComplex: it has too many tags, strips or tiles, or they overlap.
    """
    form = _Form("<" if encoded[:2] == b"II" else ">", encoded[2:4] in {b"+\0", b"\0+"})
    link = 8 if form.is_big else 4
    copy = bytearray(encoded)
    found: list[dict[int, list[int]]] = []
    samples, decoded_bytes = 0, 0
    while len(found) < pages and (start := form.number(copy, link, form.offset)):
        tags, link = _keep_pixels(copy, form, start)
        width_px, height_px = (_first(tags, code, 0) for code in (_WIDTH, _HEIGHT))
        check(width_px, height_px)
        page_samples, page_bytes = _cost(tags, encoded, check)
        samples, decoded_bytes = samples + page_samples, decoded_bytes + page_bytes
        found.append(tags)
    if not found:
        raise Malformed(_BROKEN)
    if form.number(copy, link, form.offset):
        struct.pack_into(form.order + form.offset, copy, link, 0)
    width_px, height_px = (_first(found[0], code, 0) for code in (_WIDTH, _HEIGHT))
    return PlainFile("TIFF", width_px, height_px, bytes(copy), decoded_bytes=decoded_bytes, samples=samples)


def _keep_pixels(copy: bytearray, form: _Form, start: int) -> tuple[dict[int, list[int]], int]:
    """Leave out a directory's other tags in place.

    Returns:
        The values of those that are kept, as far as they are numbers; and where the offset of the next directory is.
    """
    counts, head, entry = ("Q", 8, 20) if form.is_big else ("H", 2, 12)
    count = form.number(copy, start, counts)
    check_parts(count, len(copy), "tags")
    if start + head + entry * count + (8 if form.is_big else 4) > len(copy):
        raise Malformed(_BROKEN)
    following = bytes(copy[start + head + entry * count :][: 8 if form.is_big else 4])
    tags: dict[int, list[int]] = {}
    kept = b""
    for at in range(start + head, start + head + entry * count, entry):
        code = form.number(copy, at, "H")
        if code in _KEPT and code not in tags:
            tags[code] = _values(copy, form, at)
            kept += copy[at : at + entry]
    end = start + head + len(kept)
    copy[start : end + len(following)] = struct.pack(form.order + counts, len(tags)) + kept + following
    return tags, end


def _values(copy: bytearray, form: _Form, at: int) -> list[int]:
    """A tag's values; none if they are no whole numbers."""
    code, kind = form.number(copy, at, "H"), form.number(copy, at + 2, "H")
    count = form.number(copy, at + 4, form.offset)
    size_bytes = _TYPE_BYTES.get(kind, 1) * count
    most = MAX_STRIPS if code in _PARTS else _MOST_VALUES.get(code, _MOST_OTHER_VALUES)
    if count > most:
        what = "strips or tiles" if code in _PARTS else f"values in its tag {code}"
        raise TooComplex(f"the file has {count} {what}; at most {most} are accepted")
    where = at + (12 if form.is_big else 8)
    if size_bytes > (8 if form.is_big else 4):
        where = form.number(copy, where, form.offset)
    if where + size_bytes > len(copy):
        raise Malformed("the TIFF file is truncated")
    return list(struct.unpack_from(f"{form.order}{count}{_TYPES[kind]}", copy, where)) if kind in _TYPES else []


def _cost(tags: dict[int, list[int]], encoded: bytes, check: SizeCheck) -> tuple[int, int]:
    """Samples that are decoded for a page, and the bytes that they take."""
    compression = _first(tags, _COMPRESSION, 1)
    if compression not in _COMPRESSIONS:
        known = ", ".join(sorted(set(_COMPRESSIONS.values())))
        raise Malformed(f"a TIFF file of compression {compression}, which is not read; those that are: {known}")
    if _TILE_OFFSETS in tags and _STRIP_OFFSETS in tags:
        raise Malformed(_BROKEN)
    # libtiff takes one for the other.
    offsets = tags.get(_TILE_OFFSETS) or tags.get(_STRIP_OFFSETS, [])
    lengths = tags.get(_TILE_BYTES) or tags.get(_STRIP_BYTES, [])
    if max(lengths, default=0) > len(encoded):
        raise Malformed("the TIFF file is truncated")
    if sum(lengths) > len(encoded):
        raise TooComplex("the strips or tiles of the file overlap")
    width_px, height_px = _first(tags, _WIDTH, 0), _first(tags, _HEIGHT, 0)
    if not tags.keys().isdisjoint({_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS}):
        # Tiles are unpacked whole, and may be far larger than the image.
        across_px, down_px = _first(tags, _TILE_WIDTH, 0), _first(tags, _TILE_HEIGHT, 0)
        check(across_px, down_px)
        if min(across_px, down_px) < 1:
            raise Malformed(_BROKEN)
        width_px, height_px = -(-width_px // across_px) * across_px, -(-height_px // down_px) * down_px
    pixels, bits = width_px * height_px, max(tags.get(_BITS) or [1])
    samples = pixels * _first(tags, _SAMPLES, 1)
    # Pillow's pixels of four bytes, twice, and as decoded; or as decoded, and twice as float32.
    decoded_bytes = pixels * 11 if bits <= 8 and samples <= 4 * pixels else samples * (8 + -(-bits // 8))
    if compression == _JPEG:
        check_parts(len(offsets), len(encoded), "strips or tiles of JPEG")
        if len(offsets) != len(lengths):
            # libtiff would guess how long they are.
            raise Malformed(_BROKEN)
        samples, segments = 0, -_SEGMENTS * len(offsets)
        for start, length in zip(offsets, lengths, strict=True):
            part = walk_jpeg(encoded[start : start + length], check)
            samples, segments = samples + part.samples, segments + part.parts
            check_parts(segments, len(encoded), f"segments beyond {_SEGMENTS} per strip or tile of JPEG")
    return samples, decoded_bytes


def _first(tags: dict[int, list[int]], code: int, default: int) -> int:
    return next(iter(tags.get(code, [])), default)
