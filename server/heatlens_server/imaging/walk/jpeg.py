"""The segments of JPEG files (ITU-T T.81, annex B): how many scans a decoder goes through, and which parts it needs."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heatlens_server.imaging.limits import TRUNCATED, Malformed, check_parts
from heatlens_server.imaging.orientation import orientation_of
from heatlens_server.imaging.walk.plain import RESIZING_BYTES, Pieces, PlainFile, SizeCheck

_SIGNATURE = b"\xff\xd8\xff"

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
# Frames by Huffman codes; those by arithmetic codes cost many times as much per byte, and hardly a program reads them.
_FRAMES = frozenset({0xC0, 0xC1, 0xC2, 0xC3})
_ARITHMETIC = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_HIERARCHICAL = frozenset({0xC5, 0xC6, 0xC7})
_PROGRESSIVE = 0xC2
# Tables of Huffman codes and quantisation, restart interval; what APP0 and APP14 say of the colours.
_TABLES = frozenset({0xC4, 0xDB, 0xDD})
_COLORS = frozenset({0xE0, 0xEE})
_APP1 = 0xE1
# What may follow 0xFF that is no marker of a segment: nothing, stuffing, fill, restarts.
_NO_MARKERS = frozenset({b"", b"\0", b"\xff"} | {bytes([0xD0 + i]) for i in range(8)})
_EXIF = b"Exif\0\0"

_BLOCK = 8
# The next marker after a header is near; scans' data are searched in blocks that fit a CPU's cache.
_FIRST_SEARCH_BYTES, _MOST_SEARCH_BYTES = 64, 1 << 18


@dataclass(slots=True)
class _Frame:
    """What a frame's header says; the samples of each component, whole blocks, by its id."""

    width_px: int
    height_px: int
    is_progressive: bool
    samples: dict[int, int]


def is_jpeg(encoded: bytes) -> bool:
    """Whether a file begins as a JPEG does."""
    return encoded.startswith(_SIGNATURE)


def walk_jpeg(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a JPEG's segments up to its end, or to the end of the bytes if that comes first.

    What stays are the frame's header, tables, scans, and what tells the colours. Fill bytes and what lies between
    segments is left out, as are the images that follow the first one (Multi-Picture Format).

    Raises:
        Malformed: it is none, or of a kind that is not read.
        TooComplex: it has too many segments.
    """
    values = np.frombuffer(encoded, np.uint8)
    pieces = Pieces(encoded)
    pieces.keep(0, 2)
    frame: _Frame | None = None
    orientation, samples, parts = 1, 0, 0
    start = _next_marker(values, 2)
    while start < len(encoded):
        parts += 1
        check_parts(parts, len(encoded), "segments")
        kind = encoded[start + 1]
        if kind == _EOI:
            pieces.keep(start, start + 2)
            break
        end = _end_of(encoded, start, kind)
        following = _next_marker(values, end)
        if kind in _ARITHMETIC or kind in _HIERARCHICAL:
            raise Malformed("a JPEG of arithmetic codes or of several sizes, which is not read")
        if kind in _FRAMES:
            if frame is not None:
                raise Malformed(TRUNCATED)
            frame = _frame(encoded[start:end], kind)
            check(frame.width_px, frame.height_px)
        if kind == _SOS:
            if frame is None:
                raise Malformed(TRUNCATED)
            samples += sum(frame.samples.get(component, 0) for component in _scanned(encoded[start:end]))
            pieces.keep(start, following)
        elif kind in _FRAMES or kind in _TABLES or kind in _COLORS:
            pieces.keep(start, end)
        elif kind == _APP1 and orientation == 1 and encoded[start + 4 : start + 10] == _EXIF:
            orientation = orientation_of(encoded[start + 10 : end])
        start = following
    if frame is None:
        raise Malformed(TRUNCATED)
    # A progressive image is held as coefficients of two bytes until its last scan.
    pixels = frame.width_px * frame.height_px
    held = 2 * sum(frame.samples.values()) if frame.is_progressive else 0
    return PlainFile(
        "JPEG",
        frame.width_px,
        frame.height_px,
        pieces.joined(),
        decoded_bytes=max(RESIZING_BYTES * pixels, 3 * pixels + held),
        samples=samples,
        parts=parts,
        orientation=orientation,
    )


def _next_marker(values: npt.NDArray[np.uint8], start: int) -> int:
    """Where the next marker is that is no restart, stuffing or fill byte; the end of the file if there is none."""
    near = values[start : start + 2].tobytes()
    if near[:1] == b"\xff" and near[1:] not in _NO_MARKERS:
        return start
    size = _FIRST_SEARCH_BYTES
    while start + 1 < len(values):
        block = values[start : start + size + 1]
        kinds = block[1:]
        found = block[:-1] == 0xFF
        found &= kinds != 0
        found &= kinds != 0xFF
        found &= (kinds & 0xF8) != 0xD0
        first = int(found.argmax())
        if found[first]:
            return start + first
        start += size
        size = min(8 * size, _MOST_SEARCH_BYTES)
    return len(values)


def _end_of(encoded: bytes, start: int, kind: int) -> int:
    """Where a segment ends: markers without parameters, or marker, two bytes of length, parameters."""
    if kind == _TEM:
        return start + 2
    length = int.from_bytes(encoded[start + 2 : start + 4], "big")
    if kind == _SOI or length < 2 or start + 2 + length > len(encoded):
        raise Malformed(TRUNCATED)
    return start + 2 + length


def _frame(segment: bytes, kind: int) -> _Frame:
    """Read a frame's header: B.2.2."""
    height_px, width_px = int.from_bytes(segment[5:7], "big"), int.from_bytes(segment[7:9], "big")
    components = [tuple(segment[at : at + 2]) for at in range(10, len(segment) - 2, 3)]
    factors = {number: (factor >> 4, factor & 15) for number, factor in components}
    if len(segment) < 13 or len(components) != segment[9] or not all(all(pair) for pair in factors.values()):
        raise Malformed(TRUNCATED)
    if width_px == 0 or height_px == 0:
        raise Malformed("a JPEG whose header lacks its size, which is not read")
    most_h, most_v = max(pair[0] for pair in factors.values()), max(pair[1] for pair in factors.values())
    # In units of interleaved blocks, A.2.
    across, down = -(-width_px // (_BLOCK * most_h)), -(-height_px // (_BLOCK * most_v))
    samples = {number: across * down * h * v * _BLOCK * _BLOCK for number, (h, v) in factors.items()}
    return _Frame(width_px, height_px, kind == _PROGRESSIVE, samples)


def _scanned(segment: bytes) -> list[int]:
    """The ids of a scan's components: B.2.3."""
    count = segment[4] if len(segment) > 4 else 0
    if len(segment) != 8 + 2 * count:
        raise Malformed(TRUNCATED)
    return [segment[5 + 2 * i] for i in range(count)]
