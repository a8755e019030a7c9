"""Frames within the data of AV1 and HEVC items: how many there are, and how large they may be."""

from collections.abc import Iterator
from dataclasses import dataclass

from heatlens_server.imaging.limits import TRUNCATED, Malformed, check_parts

# AV1 bitstream specification, 6.2.2.
_SEQUENCE, _FRAME_HEADER, _FRAME = 1, 3, 6
# ITU-T H.265, table 7-1.
_FIRST_NON_PICTURE, _SPS = 32, 33
_MOST_HEADER_BYTES = 512


@dataclass(slots=True)
class Frames:
    """What an item holds.

    Attributes:
        count: of the frames, shown or not.
        width_px: the largest that they may have.
        height_px: likewise.
        parts: how many units there are.
    """

    count: int = 0
    width_px: int = 0
    height_px: int = 0
    parts: int = 0

    def add_unit(self, data: bytes) -> None:
        """There is one more unit in an item's data.

        Raises:
            TooComplex: they are too many.
        """
        self.parts += 1
        check_parts(self.parts, len(data), "units in an item")

    def may_be(self, width_px: int, height_px: int) -> None:
        """Frames may have this size."""
        self.width_px, self.height_px = max(self.width_px, width_px), max(self.height_px, height_px)


class _Bits:
    """Reads bits one after the other. Raises Malformed beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._value = int.from_bytes(data, "big")
        self._left = 8 * len(data)

    def take(self, count: int) -> int:
        self._left -= count
        if self._left < 0:
            raise Malformed(TRUNCATED)
        return self._value >> self._left & (1 << count) - 1

    def golomb(self) -> int:
        """An unsigned number of exponential Golomb code: AV1 4.10.3, H.265 9.2."""
        zeros = 0
        while not self.take(1):
            zeros += 1
        return (1 << zeros) - 1 + self.take(zeros)


def av1_frames(data: bytes) -> Frames:
    """Walk over open bitstream units: AV1 5.3.

    Raises:
        Malformed: they are truncated.
        TooComplex: they are too many.
    """
    found, at = Frames(), 0
    while at < len(data):
        found.add_unit(data)
        kind = data[at] >> 3 & 15
        has_size, start = data[at] & 2, at + 1 + (data[at] >> 2 & 1)
        size, shift = 0, 0
        while has_size:
            if start >= len(data) or shift > 49:
                raise Malformed(TRUNCATED)
            byte = data[start]
            size |= (byte & 0x7F) << shift
            start, shift, has_size = start + 1, shift + 7, byte & 0x80
        end = start + size if data[at] & 2 else len(data)
        if end > len(data):
            raise Malformed(TRUNCATED)
        found.count += kind in {_FRAME_HEADER, _FRAME}
        if kind == _SEQUENCE:
            found.may_be(*_av1_size(_Bits(data[start : min(end, start + _MOST_HEADER_BYTES)])))
        at = end
    return found


def _av1_size(bits: _Bits) -> tuple[int, int]:
    """The largest size that a sequence header lets frames have: AV1 5.5.1."""
    bits.take(4)
    is_reduced = bits.take(1)
    if is_reduced:
        bits.take(5)
    else:
        _skip_operating_points(bits)
    width_bits, height_bits = bits.take(4) + 1, bits.take(4) + 1
    width_px, height_px = bits.take(width_bits) + 1, bits.take(height_bits) + 1
    # Otherwise a frame may have any size of as many bits.
    return (width_px, height_px) if is_reduced else (1 << width_bits, 1 << height_bits)


def _skip_operating_points(bits: _Bits) -> None:
    delay_bits = 0
    if bits.take(1):
        bits.take(64)
        if bits.take(1):
            bits.golomb()
        if bits.take(1):
            delay_bits = bits.take(5) + 1
            bits.take(42)
    has_display_delay = bits.take(1)
    for _ in range(bits.take(5) + 1):
        bits.take(12)
        if bits.take(5) > 7:
            bits.take(1)
        if delay_bits and bits.take(1):
            bits.take(2 * delay_bits + 1)
        if has_display_delay and bits.take(1):
            bits.take(4)


def hevc_frames(configuration: bytes, data: bytes) -> Frames:
    """Walk over the units of HEVC: ISO/IEC 14496-15, 8.3.2.

    Args:
        configuration: the item's property hvcC.
        data: the item.

    Raises:
        Malformed: they are truncated.
        TooComplex: they are too many.
    """
    if len(configuration) < 23:
        raise Malformed(TRUNCATED)
    found, at = Frames(), 23
    for _ in range(configuration[22]):
        count = int.from_bytes(configuration[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            size = int.from_bytes(configuration[at : at + 2], "big")
            found.add_unit(configuration)
            _count_unit(found, configuration[at + 2 : at + 2 + size])
            at += 2 + size
            if at > len(configuration):
                raise Malformed(TRUNCATED)
    for start, end in _units(data, (configuration[21] & 3) + 1):
        found.add_unit(data)
        _count_unit(found, data[start : min(end, start + _MOST_HEADER_BYTES)])
    return found


def _units(data: bytes, prefix_bytes: int) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(data):
        start = at + prefix_bytes
        at = start + int.from_bytes(data[at:start], "big")
        if at > len(data):
            raise Malformed(TRUNCATED)
        yield start, at


def _count_unit(found: Frames, unit: bytes) -> None:
    if len(unit) < 3:
        return
    kind = unit[0] >> 1 & 63
    found.count += kind < _FIRST_NON_PICTURE and unit[2] >> 7
    if kind == _SPS:
        found.may_be(*_hevc_size(_Bits(unit[2:].replace(b"\0\0\3", b"\0\0"))))


def _hevc_size(bits: _Bits) -> tuple[int, int]:
    """The size that a sequence's parameters tell: H.265, 7.3.2.2 and 7.3.3."""
    bits.take(4)
    layers = bits.take(3)
    bits.take(1 + 96)
    present = [(bits.take(1), bits.take(1)) for _ in range(layers)]
    if layers:
        bits.take(2 * (8 - layers))
    for has_profile, has_level in present:
        bits.take(88 * has_profile + 8 * has_level)
    bits.golomb()
    if bits.golomb() == 3:
        bits.take(1)
    return bits.golomb(), bits.golomb()
