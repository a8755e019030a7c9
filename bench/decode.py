"""What decoding costs at most: hostile files that are accepted against the dearest plain image of as many pixels."""

import functools
import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from rich.table import Table

from heatlens_server.core.errors import InvalidArgument
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.limits import PASSES

# What the tests attack with.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
import hostile_images as hostile

SIDE_PX = 4_000
FILE_BYTES = 4 << 20
"""A quarter of the default limits on pixels and bytes, so that their ratio is that of the defaults."""

MOST = 3.0
TURNS = 3

_File = Callable[[], bytes]


def run() -> Table:
    """Measure and tabulate."""
    # Processor time is compared, so that other work on the machine hardly matters; threads would add to it.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    table = Table(
        title=f"Decoding {SIDE_PX}x{SIDE_PX} pixels, CPU-seconds, best of {TURNS}; "
        f"hostile files of at most {FILE_BYTES >> 20} MiB cost at most {MOST:g} x the dearest plain one"
    )
    for column in ("file", "MiB", "CPU-s", "to the dearest plain"):
        table.add_column(column, justify="left" if column == "file" else "right")
    plain = {name: (len(file := make()), *_cost(file)) for name, make in _plain().items()}
    dearest = max(seconds for size, seconds, _ in plain.values() if size <= FILE_BYTES)
    for name, (size, seconds, outcome) in plain.items():
        table.add_row(f"plain: {name}{outcome}", f"{size / 2**20:.1f}", f"{seconds:.2f}", f"{seconds / dearest:.2f}")
    table.add_section()
    for name, make in _hostile().items():
        file = make()
        seconds, outcome = _cost(file)
        ratio = seconds / dearest
        met = "met" if ratio <= MOST and len(file) <= FILE_BYTES else "MISSED"
        table.add_row(f"{name}{outcome}", f"{len(file) / 2**20:.1f}", f"{seconds:.2f}", f"{ratio:.2f} {met}")
    cv2.setNumThreads(threads)
    return table


def _cost(file: bytes) -> tuple[float, str]:
    """The CPU-seconds of a file, and the reason if it is refused."""
    best, outcome = float("inf"), ""
    for _ in range(TURNS):
        started = time.process_time()
        try:
            decode_image(file, max_pixels=SIDE_PX**2, channels=4)
        except InvalidArgument as error:
            outcome = f" ({error.reason})"
        best = min(best, time.process_time() - started)
    return best, outcome


@functools.cache
def _photo() -> Image.Image:
    """Something smooth, as photos are."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE_PX // 16, SIDE_PX // 16, 3), dtype=np.uint8)
    return Image.fromarray(cv2.resize(noise, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC))


def _saved(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def _plain() -> Mapping[str, _File]:
    photo = _photo()
    colors = photo.quantize(16, method=Image.Quantize.FASTOCTREE)
    deep = np.zeros((SIDE_PX, SIDE_PX, 4), np.uint16)
    return {
        "JPEG": lambda: _saved(photo, "JPEG", quality=75),
        "JPEG, progressive, 4:4:4": lambda: _saved(photo, "JPEG", quality=75, progressive=True, subsampling=0),
        "PNG": lambda: _saved(photo, "PNG", compress_level=1),
        "PNG, RGBA of 16 bits": cv2.imencode(".png", deep)[1].tobytes,
        "WebP": lambda: _saved(photo, "WEBP", method=0),
        "GIF": lambda: _saved(colors, "GIF"),
        "TIFF, LZW": lambda: _saved(photo, "TIFF", compression="tiff_lzw"),
        "AVIF": lambda: _saved(photo, "AVIF", speed=10),
    }


def _hostile() -> Mapping[str, _File]:
    black = Image.new("RGB", (SIDE_PX, SIDE_PX))
    strip = hostile.empty_deflate((FILE_BYTES // SIDE_PX - 50) // 5, bytes(SIDE_PX))
    # Eight passes of the image's own, four of them chroma's; then as many as are accepted.
    return {
        "JPEG, all the scans that are accepted": lambda: hostile.jpeg_of_scans(SIDE_PX, SIDE_PX, PASSES - 9),
        "JPEG, a restart in every block": lambda: _saved(_photo(), "JPEG", quality=30, restart_marker_blocks=1),
        "PNG, interlaced RGBA of 16 bits": lambda: hostile.interlaced_png(SIDE_PX),
        "PNG, tables of codes without end": lambda: hostile.png_of_tables(SIDE_PX, SIDE_PX, FILE_BYTES * 3 // 4),
        "WebP, lossless in an animation": lambda: hostile.animation(black, "WEBP", 3),
        "GIF, one colour": lambda: _saved(black.convert("L"), "GIF"),
        "BMP, run lengths": lambda: hostile.bmp_of_runs(SIDE_PX, SIDE_PX),
        "TIFF, empty blocks in strips": lambda: hostile.tiff_of_strips(SIDE_PX, SIDE_PX, strip, 8, apart=True),
        "TIFF, LZMA": lambda: _saved(black, "TIFF", compression="lzma"),
        "AVIF, hidden frames": lambda: hostile.avif_of_frames(_photo(), PASSES // 8, quality=20),
    }
