"""What the walks find, and the pieces that they make files of."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

RESIZING_BYTES = 7
"""Of a pixel of three colours of 8 bits: three as decoded, four as resized."""

_JPEG_SAMPLE_S, _SAMPLE_S = 2.5e-9, 8e-9
"""What decoders take per sample at most, in seconds of one core of 2020's: `python -m bench --only decode`."""

SizeCheck = Callable[[int, int], None]
"""Raises if a width and height, in pixels, are not accepted. A walk calls it as soon as it knows them."""


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file with its pixels and nothing else, before they are decoded.

    Attributes:
        file_format: as Pillow names it; "BMP-RLE" for a BMP of run lengths.
        width_px: as stored, before the orientation is applied.
        height_px: as stored.
        encoded: the file, for decoders.
        decoded_bytes: the most memory that decoding and resizing it takes at a time.
        samples: the samples that a decoder goes over, each as often as it does.
        parts: how many segments of a JPEG were walked over; 0 of others.
        orientation: 1 to 8, as in EXIF.
        is_deep: whether samples have more than 8 bits.
        significant_bits: how many bits its samples had, if it says so.
    """

    file_format: str
    width_px: int
    height_px: int
    encoded: bytes
    decoded_bytes: int
    samples: int
    parts: int = 0
    orientation: int = 1
    is_deep: bool = False
    significant_bits: int | None = None

    @property
    def decode_s(self) -> float:
        """How long decoding it takes, about, in seconds."""
        return self.samples * (_JPEG_SAMPLE_S if self.file_format == "JPEG" else _SAMPLE_S)


@dataclass(slots=True)
class Pieces:
    """The parts of a file that are kept, in order. Neighbours are kept as one."""

    encoded: bytes
    spans: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def keep(self, start: int, end: int) -> None:
        """Keep the bytes from `start` up to `end`."""
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], end)
        else:
            self.spans.append((start, end))

    def joined(self) -> bytes:
        """What is kept; the file itself if that is all of it."""
        if self.spans == [(0, len(self.encoded))]:
            return self.encoded
        view = memoryview(self.encoded)
        return b"".join([view[start:end] for start, end in self.spans])
