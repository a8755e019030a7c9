"""The blocks of GIF files before their first frame, and the header of BMP files."""

from heatlens_server.imaging.limits import TRUNCATED, Malformed, check_parts
from heatlens_server.imaging.walk.plain import Pieces, PlainFile, SizeCheck

_GIF_SIGNATURES = (b"GIF87a", b"GIF89a")
_BMP_SIGNATURE = b"BM"

_EXTENSION, _FRAME, _CONTROL = 0x21, 0x2C, 0xF9
_HAS_TABLE, _TABLE_SIZE = 0x80, 0x07
_CORE_HEADER_BYTES = 12
_RUN_LENGTHS = frozenset({1, 2})


def is_gif(encoded: bytes) -> bool:
    """Whether a file begins as a GIF does."""
    return encoded.startswith(_GIF_SIGNATURES)


def is_bmp(encoded: bytes) -> bool:
    """Whether a file begins as a BMP does."""
    return encoded.startswith(_BMP_SIGNATURE)


def walk_gif(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a GIF's blocks up to its first frame (GIF89a specification, 17 to 26), whose control is kept.

    Raises:
        Malformed: it is none, or truncated or corrupt.
        TooComplex: it has too many blocks before its first frame.
    """
    pieces = Pieces(encoded)
    start = 13 + _table_bytes(encoded, 10)
    pieces.keep(0, start)
    control: tuple[int, int] | None = None
    parts = 0
    while start < len(encoded) and encoded[start] == _EXTENSION:
        end = start + 2
        while end < len(encoded) and encoded[end]:
            parts += 1
            check_parts(parts, len(encoded), "blocks before its first frame")
            end += 1 + encoded[end]
        parts += 1
        check_parts(parts, len(encoded), "blocks before its first frame")
        if encoded[start + 1 : start + 2] == bytes([_CONTROL]):
            control = (start, end + 1)
        start = end + 1
    if start + 10 > len(encoded) or encoded[start] != _FRAME:
        raise Malformed(TRUNCATED)
    if control is not None:
        pieces.keep(*control)
    pieces.keep(start, len(encoded))
    # A frame that reaches over the canvas makes it larger, as Pillow has it.
    left, top, across, down = (int.from_bytes(encoded[at : at + 2], "little") for at in range(start + 1, start + 9, 2))
    width_px = max(left + across, int.from_bytes(encoded[6:8], "little"))
    height_px = max(top + down, int.from_bytes(encoded[8:10], "little"))
    check(width_px, height_px)
    pixels = width_px * height_px
    return PlainFile("GIF", width_px, height_px, pieces.joined(), decoded_bytes=8 * pixels, samples=pixels)


def walk_bmp(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Read a BMP's header.

    Those of run lengths are told apart: Pillow decodes them in Python.

    Raises:
        Malformed: it is truncated.
    """
    header_bytes = int.from_bytes(encoded[14:18], "little")
    if len(encoded) < 14 + min(max(header_bytes, _CORE_HEADER_BYTES), 40):
        raise Malformed(TRUNCATED)
    if header_bytes == _CORE_HEADER_BYTES:
        width_px, height_px = int.from_bytes(encoded[18:20], "little"), int.from_bytes(encoded[20:22], "little")
        packed = False
    else:
        width_px, height_px = (
            abs(int.from_bytes(encoded[at : at + 4], "little", signed=True)) for at in range(18, 26, 4)
        )
        packed = int.from_bytes(encoded[30:34], "little") in _RUN_LENGTHS
    check(width_px, height_px)
    pixels = width_px * height_px
    name = "BMP-RLE" if packed else "BMP"
    return PlainFile(name, width_px, height_px, encoded, decoded_bytes=11 * pixels, samples=3 * pixels)


def _table_bytes(encoded: bytes, flags_at: int) -> int:
    """The size of a table of colours, as flags tell it: GIF89a specification, 18.c."""
    if flags_at >= len(encoded):
        raise Malformed(TRUNCATED)
    flags = encoded[flags_at]
    return 3 << 1 + (flags & _TABLE_SIZE) if flags & _HAS_TABLE else 0
