"""`heatlens batch` against plain calls of the SDK, as many in flight, and the memory that it takes over many images."""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import psutil
from rich.table import Table

from bench.served import Service, serve
from bench.stream import TINY_MODEL
from bench.tiny_network import INPUT_PX
from heatlens import AsyncClient

IN_FLIGHT = 16
SIDE_PX = 2 * INPUT_PX
FEWER = 10
MIN_RATIO = 0.8
MAX_GROWTH = 1.2
_LOOK_S = 0.05
_PROGRAM = "from heatlens._cli.commands import app; app()"


@dataclass(frozen=True, slots=True)
class _Batch:
    """One run of the command: images a second, and the most memory that its process had, in bytes."""

    images_per_s: float
    rss_bytes: int


def run(*, turns: int, images: int) -> Table:
    """Measure and tabulate.

    Args:
        turns: how often each is run.
        images: how many are explained in each; the memory of so many is compared with that of a tenth.
    """
    table = Table(title=f"heatlens batch / plain calls, {IN_FLIGHT} in flight: a tiny network, small JPEGs")
    fewer = images // FEWER
    for column in ("plain/s", "batch/s", "batch / plain", f"RSS, {fewer} images, MB", f"{images}, MB", "growth"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name, serve(TINY_MODEL) as service:
        folder = Path(name)
        paths = _write(folder / "many", images)
        _write(folder / "few", fewer)
        asyncio.run(_plain(service, paths[:fewer]))  # warms up
        plain: list[float] = []
        runs: dict[str, list[_Batch]] = {"few": [], "many": []}
        for turn in range(turns):
            # Who goes first changes.
            for what in ("plain", "few", "many")[:: 1 if turn % 2 else -1]:
                if what == "plain":
                    plain.append(images / asyncio.run(_plain(service, paths)))
                else:
                    runs[what].append(_batch(service, folder / what, folder / f"{what}{turn}.parquet"))
    ratio = statistics.median(b.images_per_s / p for b, p in zip(runs["many"], plain, strict=True))
    growth = statistics.median(b.rss_bytes / a.rss_bytes for a, b in zip(runs["few"], runs["many"], strict=True))
    table.add_row(
        f"{statistics.median(plain):.0f}",
        f"{statistics.median(one.images_per_s for one in runs['many']):.0f}",
        f"{ratio:.2f} ({'met' if ratio >= MIN_RATIO else 'MISSED'})",
        *(f"{statistics.median(one.rss_bytes for one in each) / 1e6:.0f}" for each in runs.values()),
        f"{growth:.2f} ({'met' if growth <= MAX_GROWTH else 'MISSED'})",
    )
    table.caption = (
        f"Targets: >= {MIN_RATIO} of the plain calls, whose answers nobody keeps, with the command's start and its "
        f"table; and <= {MAX_GROWTH} of the memory for {FEWER} times the images."
    )
    return table


def _write(folder: Path, count: int) -> list[Path]:
    """Small JPEGs of noise, all different."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    paths = [folder / f"{i}.jpg" for i in range(count)]
    for path in paths:
        coarse = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (SIDE_PX, SIDE_PX)))
    return paths


async def _plain(service: Service, paths: Sequence[Path]) -> float:
    """Seconds to explain files by calls, whose answers nobody keeps."""
    left = iter(paths)
    began_s = time.perf_counter()
    async with AsyncClient(service.address) as client:

        async def caller() -> None:
            for path in left:
                await client.explain(path, map_type="float16")

        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - began_s


def _batch(service: Service, folder: Path, table: Path) -> _Batch:
    """Run the command on a folder."""
    command = [sys.executable, "-c", _PROGRAM, "batch", folder, "-o", table, "--server", service.address]
    began_s = time.perf_counter()
    process = psutil.Popen([*map(str, command), "--concurrency", str(IN_FLIGHT)], stdout=subprocess.DEVNULL)
    most_bytes = 0
    while process.poll() is None:
        most_bytes = max(most_bytes, process.memory_info().rss)
        time.sleep(_LOOK_S)
    if process.returncode:
        raise RuntimeError("the batch failed")
    return _Batch(sum(1 for _ in folder.iterdir()) / (time.perf_counter() - began_s), most_bytes)
