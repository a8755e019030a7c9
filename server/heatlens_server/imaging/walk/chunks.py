"""The chunks of PNG and WebP files: the pixels' are kept, all others left out."""

import zlib

from heatlens_server.imaging.limits import TRUNCATED, Malformed, check_parts
from heatlens_server.imaging.orientation import orientation_of
from heatlens_server.imaging.walk.plain import RESIZING_BYTES, Pieces, PlainFile, SizeCheck

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_WEBP_SIGNATURE, _WEBP_KIND = b"RIFF", b"WEBP"

_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PNG_HEADER_END = 33
_LOWER_CASE = 0x20
_WEBP_KEPT = frozenset({b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L"})
_WEBP_PIXELS = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
# In the flags of VP8X: that chunks of a profile, EXIF or XMP follow.
_WEBP_LEFT_OUT = 0x20 | 0x08 | 0x04


def is_png(encoded: bytes) -> bool:
    """Whether a file begins as a PNG does."""
    return encoded.startswith(_PNG_SIGNATURE)


def is_webp(encoded: bytes) -> bool:
    """Whether a file begins as a WebP does."""
    return encoded.startswith(_WEBP_SIGNATURE) and encoded[8:12] == _WEBP_KIND


def walk_png(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a PNG's chunks up to its end, and check the checksums of those that are kept.

    Chunks: 4 bytes of length, 4 of type, data, 4 of checksum (PNG specification, 5.3). Of an animation the image that
    readers without animations show is kept.

    Raises:
        Malformed: it is none, or truncated or corrupt.
        TooComplex: it has too many chunks.
    """
    view = memoryview(encoded)
    pieces = Pieces(encoded)
    pieces.keep(0, len(_PNG_SIGNATURE))
    start, parts, orientation = len(_PNG_SIGNATURE), 0, 1
    bits: int | None = None
    kind = b""
    while kind != b"IEND":
        parts += 1
        check_parts(parts, len(encoded), "chunks")
        end = start + 12 + int.from_bytes(encoded[start : start + 4], "big")
        kind = encoded[start + 4 : start + 8]
        if (parts == 1) != (kind == b"IHDR"):
            raise Malformed(TRUNCATED)
        if parts == 1:
            check(int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big"))
        if end > len(encoded) or (parts == 1 and end != _PNG_HEADER_END):
            raise Malformed(TRUNCATED)
        if kind in _PNG_KEPT:
            if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(encoded[end - 4 : end], "big"):
                raise Malformed(TRUNCATED)
            pieces.keep(start, end)
        elif not kind[0] & _LOWER_CASE:
            raise Malformed(TRUNCATED)  # it says that readers need it
        elif kind == b"eXIf":
            orientation = orientation_of(encoded[start + 8 : end - 4])
        elif kind == b"sBIT" and bits is None:
            bits = max(encoded[start + 8 : min(end - 4, start + 12)], default=None)
        start = end
    width_px, height_px = int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big")
    depth, channels = encoded[24], _PNG_CHANNELS.get(encoded[25], 4)
    is_deep = depth == 16
    return PlainFile(
        "PNG",
        width_px,
        height_px,
        pieces.joined(),
        # Of 16 bits: as decoded, and as float32.
        decoded_bytes=width_px * height_px * (24 if is_deep else RESIZING_BYTES),
        samples=width_px * height_px * channels,
        orientation=orientation,
        is_deep=is_deep,
        significant_bits=bits,
    )


def walk_webp(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over a WebP's chunks: 4 bytes of type, 4 of length, data, a byte where the length is odd (RFC 9649, 2.3).

    Of an animation the first frame is kept.

    Raises:
        Malformed: it is none, or truncated or corrupt.
        TooComplex: it has too many chunks.
    """
    whole = 8 + int.from_bytes(encoded[4:8], "little")
    if whole > len(encoded):
        raise Malformed(TRUNCATED)
    start, parts, orientation, frames = 12, 0, 1, 0
    kept: list[bytes | memoryview] = []
    view = memoryview(encoded)
    size: tuple[int, int] | None = None
    while start + 8 <= whole:
        parts += 1
        check_parts(parts, len(encoded), "chunks")
        kind = encoded[start : start + 4]
        data = start + 8
        end = data + int.from_bytes(encoded[start + 4 : data], "little")
        if end > whole:
            raise Malformed(TRUNCATED)
        if size is None:
            size = _webp_size(kind, encoded[data : data + 10])
            check(*size)
        frames += kind in _WEBP_PIXELS
        if kind == b"VP8X":
            kept += [view[start:data], bytes([encoded[data] & ~_WEBP_LEFT_OUT]), view[data + 1 : end + (end & 1)]]
        elif (kind in _WEBP_KEPT and frames <= 1) or (kind == b"ANMF" and frames == 1):
            kept.append(view[start : end + (end & 1)])
        elif kind == b"EXIF":
            orientation = orientation_of(encoded[data:end].removeprefix(b"Exif\0\0"))
        start = end + (end & 1)
    if size is None or frames == 0:
        raise Malformed(TRUNCATED)
    body = b"".join(kept)
    width_px, height_px = size
    return PlainFile(
        "WEBP",
        width_px,
        height_px,
        encoded
        if len(body) + 12 == len(encoded)
        else b"".join([_WEBP_SIGNATURE, (4 + len(body)).to_bytes(4, "little"), _WEBP_KIND, body]),
        # The decoder of animations holds two canvases of four channels.
        decoded_bytes=width_px * height_px * (11 if encoded[12:16] == b"VP8X" else RESIZING_BYTES),
        samples=width_px * height_px * 4,
        orientation=orientation,
    )


def _webp_size(kind: bytes, head: bytes) -> tuple[int, int]:
    """The size that the first chunk tells: RFC 9649, 2.5 to 2.7 and 3.4; RFC 6386, 9.1."""
    if kind == b"VP8X" and len(head) == 10:
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    if kind == b"VP8L" and head[:1] == b"\x2f":
        packed = int.from_bytes(head[1:5], "little")
        return 1 + (packed & 0x3FFF), 1 + (packed >> 14 & 0x3FFF)
    raise Malformed(TRUNCATED)
