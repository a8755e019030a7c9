"""Image files that take a decoder far longer than plain ones of their size, and what their headers hide it in."""

import io
import itertools
import struct
import zlib

import numpy as np
from PIL import Image

from image_files import saved

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def jpeg_of_scans(width_px: int, height_px: int, extra_scans: int) -> bytes:
    """A black progressive JPEG whose last scan, some bytes of all three components or one, follows again and again."""
    whole = saved(Image.new("RGB", (width_px, height_px)), "JPEG", progressive=True)
    start = whole.rindex(b"\xff\xda")
    return whole[:-2] + whole[start:-2] * extra_scans + whole[-2:]


def jpeg_with(image: Image.Image, inserted: bytes) -> bytes:
    """A JPEG with something between its start and its first segment."""
    whole = saved(image, "JPEG")
    return whole[:2] + inserted + whole[2:]


def jpeg_segment(kind: int, data: bytes = b"") -> bytes:
    """One segment."""
    return bytes([0xFF, kind]) + struct.pack(">H", 2 + len(data)) + data


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    """One chunk, with the right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(image: Image.Image, *chunks: bytes, at: bytes = b"IDAT") -> bytes:
    """A PNG with chunks before its first one of a type."""
    whole = saved(image, "PNG")
    start = whole.index(at) - 4
    return whole[:start] + b"".join(chunks) + whole[start:]


def png_of_empty_data(image: Image.Image, count: int) -> bytes:
    """A PNG whose pixels follow very many chunks without data."""
    return png_with(image, png_chunk(b"IDAT") * count)


def packed_text(unpacked_bytes: int) -> bytes:
    """A zTXt chunk of a thousandth of its text."""
    return png_chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(unpacked_bytes), 9))


def exif(orientation: int, *, filler_entries: int = 0) -> bytes:
    """EXIF data with an orientation, behind entries that all name all of the data as their value."""
    entries = b"".join(struct.pack("<HHII", 0xC000 + i % 0x3000, 7, 60_000, 8) for i in range(filler_entries))
    entries += struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0)
    return b"II*\0" + struct.pack("<IH", 8, filler_entries + 1) + entries + bytes(4)


def webp_chunk(kind: bytes, data: bytes = b"") -> bytes:
    """One chunk."""
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) & 1)


def webp_with(image: Image.Image, *chunks: bytes) -> bytes:
    """A lossless WebP of the extended kind, with chunks behind its pixels. Its flags say that there is everything."""
    body = saved(image, "WEBP", lossless=True)[12:]
    size = (image.width - 1).to_bytes(3, "little") + (image.height - 1).to_bytes(3, "little")
    head = webp_chunk(b"VP8X", bytes([0x2C, 0, 0, 0]) + size)
    whole = b"WEBP" + head + body + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(whole)) + whole


def gif_with_comments(image: Image.Image, blocks: int) -> bytes:
    """A GIF with a comment of one byte per block before its first frame."""
    whole = saved(image, "GIF")
    start = 13 + (3 << 1 + (whole[10] & 7) if whole[10] & 0x80 else 0)
    return whole[:start] + b"\x21\xfe" + b"\x01x" * blocks + b"\0" + whole[start:]


def bmp_of_runs(width_px: int, height_px: int) -> bytes:
    """A BMP of 8 bits in run lengths (BI_RLE8): rows of one colour, of index 1, which is red."""
    palette = bytes([0, 0, 0, 0, 0, 0, 255, 0]) + bytes(254 * 4)
    runs = [255] * (width_px // 255) + [width_px % 255] * (width_px % 255 > 0)
    row = b"".join(bytes([run, 1]) for run in runs) + b"\0\0"
    pixels = row * height_px + b"\0\1"
    offset = 14 + 40 + len(palette)
    head = struct.pack("<IiiHHIIiiII", 40, width_px, height_px, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + head + palette + pixels


def tiff_of(tags: dict[int, tuple[int, list[int]]], data: bytes) -> bytes:
    """A TIFF of one directory: type and values by tag. Data lie at 8."""
    forms = {3: "H", 4: "I"}
    entries, values = [], b""
    after = 8 + len(data)
    for code, (kind, numbers) in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}{forms[kind]}", *numbers)
        if len(packed) > 4:
            packed, values = struct.pack("<I", after + len(values)), values + packed
        entries.append(struct.pack("<HHI", code, kind, len(numbers)) + packed.ljust(4, b"\0"))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return b"II*\0" + struct.pack("<I", after + len(values)) + data + values + directory


def tiff_of_strips(width_px: int, height_px: int, strip: bytes, compression: int, *, apart: bool = False) -> bytes:
    """A TIFF of 8-bit gray, one strip per row, which are all one and the same, or copies."""
    step = len(strip) if apart else 0
    return tiff_of(
        {
            256: (4, [width_px]),
            257: (4, [height_px]),
            258: (3, [8]),
            259: (3, [compression]),
            262: (3, [1]),
            273: (4, [8 + step * i for i in range(height_px)]),
            277: (3, [1]),
            278: (3, [1]),
            279: (4, [len(strip)] * height_px),
        },
        strip * (height_px if apart else 1),
    )


def empty_deflate(count: int, then: bytes) -> bytes:
    """Deflated data behind very many blocks that hold nothing."""
    return b"\x78\x01" + b"\0\0\0\xff\xff" * count + zlib.compress(then)[2:]


def png_of_tables(width_px: int, height_px: int, size_bytes: int) -> bytes:
    """A PNG of 8-bit gray whose data are short blocks, each with tables of codes of its own, up to a size."""
    packer = zlib.compressobj(9, memLevel=1)
    rows = iter(np.random.default_rng(1).integers(0, 2, (64, width_px + 1), dtype=np.uint8) * 7)
    lines = [b"\0" + row.tobytes()[1:] for row in rows]
    out, used = [], 0
    for line in itertools.islice(itertools.cycle(lines), height_px):
        block = packer.compress(line)
        if used < size_bytes:
            block += packer.flush(zlib.Z_FULL_FLUSH)
        used += len(block)
        out.append(block)
    out.append(packer.flush())
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"".join(out)) + png_chunk(b"IEND")


def animation(image: Image.Image, file_format: str, frames: int) -> bytes:
    """An animation whose first frame is the image."""
    buffer = io.BytesIO()
    others = [
        Image.fromarray(np.full((image.height, image.width, 3), 40 * i % 256, np.uint8)) for i in range(1, frames)
    ]
    image.save(buffer, file_format, save_all=True, append_images=others, lossless=True)
    return buffer.getvalue()


def avif_of_frames(image: Image.Image, frames: int, *, quality: int = 75) -> bytes:
    """An AVIF whose only item holds its frame again and again; decoders go through all and show one."""
    whole = saved(image, "AVIF", quality=quality, speed=10, max_threads=1)
    start = whole.index(b"mdat") + 4
    payload = whole[start:]
    length = struct.pack(">I", len(payload))
    assert whole.count(length, 0, start) == 1
    head = whole[: start - 8].replace(length, struct.pack(">I", frames * len(payload)))
    return head + struct.pack(">I", 8 + frames * len(payload)) + b"mdat" + payload * frames


def interlaced_png(side_px: int) -> bytes:
    """A black PNG of the dearest kind: RGBA of 16 bits, interlaced by Adam7, rows filtered by Paeth's predictor."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    packer = zlib.compressobj(1)
    out = []
    for left, top, step_x, step_y in passes:
        row = b"\4" + bytes(8 * -(-(side_px - left) // step_x))
        out += [packer.compress(row) for _ in range(-(-(side_px - top) // step_y))]
    header = struct.pack(">IIBBBBB", side_px, side_px, 16, 6, 0, 0, 1)
    pixels = png_chunk(b"IDAT", b"".join([*out, packer.flush()]))
    return PNG_SIGNATURE + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND")
