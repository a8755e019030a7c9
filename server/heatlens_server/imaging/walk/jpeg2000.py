"""The headers of JPEG 2000 codestreams (ITU-T T.800, annex A): how many packets and samples a decoder goes through."""

from heatlens_server.imaging.limits import TRUNCATED, Malformed, TooComplex, check_parts
from heatlens_server.imaging.walk.plain import PlainFile, SizeCheck

MAX_PACKETS = 1_000_000
"""Most packets: tiles x components x resolutions x layers x precincts."""

_SAMPLES_OF_SAMPLE = 8
"""A sample of wavelets takes as long as eight of others."""

_SAMPLE_BYTES, _BLOCK_BYTES = 12, 700
"""What OpenJPEG holds of a sample, and of a block of codes however small it is."""

_SIZ, _COD, _COC, _SOT, _SOD, _EOC = 0xFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93, 0xFFD9
_START = b"\xff\x4f\xff\x51"
_SIZ_BYTES = 38


def walk_jpeg2000(encoded: bytes, check: SizeCheck) -> PlainFile:
    """Walk over the main header and those of the tiles. The file is kept as it is.

    Raises:
        Malformed: it is no codestream, or truncated.
        TooComplex: it has too many segments, tiles or packets, or tiles of a coding of their own.
    """
    if not encoded.startswith(_START) or len(encoded) < 4 + _SIZ_BYTES:
        raise Malformed(TRUNCATED)
    width, height, left, top, tile_width, tile_height, tile_left, tile_top = (
        int.from_bytes(encoded[at : at + 4], "big") for at in range(8, 40, 4)
    )
    components = int.from_bytes(encoded[40:42], "big")
    check(width - left, height - top)
    if not (tile_left <= left < width and tile_top <= top < height and 0 < components <= 4):
        raise Malformed(TRUNCATED)
    if not (tile_width and tile_height):
        raise Malformed(TRUNCATED)
    tiles = -(-(width - tile_left) // tile_width) * -(-(height - tile_top) // tile_height)
    check_parts(tiles, len(encoded), "tiles")
    packets, blocks, at, parts, in_tile = 0, 0, 2, 0, 0
    while at + 4 <= len(encoded):
        parts += 1
        check_parts(parts, len(encoded), "segments")
        marker = int.from_bytes(encoded[at : at + 2], "big")
        end = at + 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
        if marker == _EOC:
            break
        if marker == _SOT:
            in_tile, length = at, int.from_bytes(encoded[at + 6 : at + 10], "big")
            next_tile = at + length if length else len(encoded)
        elif marker == _COD and not in_tile and not packets:
            across, down = min(tile_width, width - left), min(tile_height, height - top)
            of_tile = _packets_and_blocks(encoded[at:end], across, down)
            packets, blocks = (tiles * components * count for count in of_tile)
        elif marker in {_COD, _COC}:
            raise TooComplex("tiles or components of the image have a coding of their own")
        if marker == _SOD:
            end = next_tile if in_tile else len(encoded)
        if end < at + 2:
            raise Malformed(TRUNCATED)
        at = end
    if packets > MAX_PACKETS:
        raise TooComplex(f"the image has {packets} packets; at most {MAX_PACKETS} are accepted")
    if not packets:
        raise Malformed(TRUNCATED)
    samples = (width - left) * (height - top) * components
    return PlainFile(
        "JPEG2000",
        width - left,
        height - top,
        encoded,
        decoded_bytes=samples * _SAMPLE_BYTES + blocks * _BLOCK_BYTES,
        samples=samples * _SAMPLES_OF_SAMPLE,
    )


def _packets_and_blocks(segment: bytes, across: int, down: int) -> tuple[int, int]:
    """The packets of one component of a tile, and about how many blocks of codes it has: A.6.1, B.6, B.7."""
    if len(segment) < 12:
        raise Malformed(TRUNCATED)
    layers, levels = int.from_bytes(segment[6:8], "big"), segment[9]
    if levels > 32:
        raise Malformed(TRUNCATED)
    precincts = levels + 1
    if segment[4] & 1:
        sizes = segment[14 : 14 + levels + 1]
        if len(sizes) != levels + 1:
            raise Malformed(TRUNCATED)
        # The last one is of the full size; each before it is of half as many.
        precincts = sum(
            (1 + (across >> levels - i >> (size & 15))) * (1 + (down >> levels - i >> (size >> 4)))
            for i, size in enumerate(sizes)
        )
    # Precincts have blocks of their own, in three bands.
    blocks = (1 + (across >> (segment[10] & 15) + 2)) * (1 + (down >> (segment[11] & 15) + 2))
    return layers * precincts, 2 * blocks + 3 * precincts
