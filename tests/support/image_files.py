"""Image files for tests: as Pillow writes them, and PNGs put together by hand."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

ORIENTATION = 0x0112
"""EXIF tag."""


def saved(image: Image.Image | np.ndarray, file_format: str, **options: object) -> bytes:
    """The image as a file."""
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, file_format, **options)
    return buffer.getvalue()


def png(width_px: int, height_px: int, compressed: bytes) -> bytes:
    """A PNG of 8-bit gray with the given IDAT, whatever that holds. All checksums are right."""
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", compressed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def black_png(width_px: int, height_px: int) -> bytes:
    """A whole PNG of one colour: about a thousandth of its decoded size."""
    packer = zlib.compressobj(1)
    row = bytes(1 + width_px)
    return png(width_px, height_px, b"".join([*(packer.compress(row) for _ in range(height_px)), packer.flush()]))
