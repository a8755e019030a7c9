"""A thousand replacements of a model under load: `python -m bench.reloads --count 1000`.

Two versions of an ONNX file take turns under one name. Callers compare each answer with what the version that it names
had answered before the load: a failed call, or a map of the other version, counts.
"""

import asyncio
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from bench import served
from bench.soak import resident_mb
from bench.tiny_network import INPUT_PX, TinyNetwork
from heatlens import AsyncClient, HeatlensError, Retry

CALLERS = 4
MAX_SLOPE_KB_PER_RELOAD = 10.0
TOLERANCE = 1e-4
WARM_UP = 0.2
"""Share of the replacements that is for what is made once."""

_TOKEN = "bench"
_MODEL = f"""
[admin]
enabled = true
token = "{_TOKEN}"
[[models]]
name = "tiny"
source = "onnx:tiny.onnx"
layers = ["relu_1"]
[models.preprocess]
resize_px = {INPUT_PX}
crop_px = {INPUT_PX}
mean = [0.5]
std = [0.5]
interpolation = "bilinear"
channel_order = "rgb"
scale = 1
"""


class Swaps:
    """One model whose file is replaced again and again."""

    def __init__(self, service: served.Service, files: tuple[bytes, bytes]) -> None:
        self._service = service
        self._files = files
        self._image = np.random.default_rng(0).integers(0, 256, (INPUT_PX, INPUT_PX, 3), np.uint8)
        self.maps: dict[str, np.ndarray] = {}
        self.calls, self.mixed = 0, 0
        self.failures: dict[str, int] = {}

    async def swap(self, client: AsyncClient, number: int) -> None:
        """Put the other file in the place of the one that is served, and wait until it serves."""
        path = self._service.folder / "tiny.onnx"
        path.with_suffix(".new").write_bytes(self._files[number % 2])
        await asyncio.to_thread(os.replace, path.with_suffix(".new"), path)
        await client.reload_model("tiny")

    async def explain(self, client: AsyncClient) -> tuple[str, np.ndarray]:
        """Return the version that answered, and the map."""
        answer = await client.explain(self._image, class_ids=[7])
        return answer.model_version, answer.explanations[0].heatmap.values

    async def call(self, client: AsyncClient, over: asyncio.Event) -> None:
        """Call one after the other, and compare."""
        while not over.is_set():
            self.calls += 1
            try:
                version, values = await self.explain(client)
            except HeatlensError as error:
                self.failures[error.reason] = self.failures.get(error.reason, 0) + 1
            else:
                self.mixed += not np.allclose(values, self.maps[version], atol=TOLERANCE)


async def measure(service: served.Service, files: tuple[bytes, bytes], count: int) -> Table:
    """Replace, under load; return the table."""
    swaps, over = Swaps(service, files), asyncio.Event()
    async with (
        AsyncClient(service.address, token=_TOKEN, timeout=120.0) as administrator,
        AsyncClient(service.address, retry=Retry(max_attempts=1)) as client,
    ):
        for number in range(2):
            await swaps.swap(administrator, number)
            version, values = await swaps.explain(client)
            swaps.maps[version] = values
        first, second = swaps.maps.values()
        if np.allclose(first, second, atol=100 * TOLERANCE):
            raise RuntimeError("the two versions have one map")
        callers = [asyncio.create_task(swaps.call(client, over)) for _ in range(CALLERS)]
        sizes_mb, started = [resident_mb(service.pid)], time.perf_counter()
        for number in range(count):
            await swaps.swap(administrator, number)
            sizes_mb.append(resident_mb(service.pid))
        seconds = time.perf_counter() - started
        over.set()
        await asyncio.gather(*callers)
    later = sizes_mb[round(len(sizes_mb) * WARM_UP) :]
    slope_kb = 1024 * float(np.polyfit(range(len(later)), later, 1)[0])
    table = Table(title=f"{count} replacements of one model, {CALLERS} callers, one after the other each")
    for column in ("ms each", "calls", "failed", "mixed", "first MB", "after warm-up", "last", "KB each", "target"):
        table.add_column(column, justify="right")
    failed = sum(swaps.failures.values())
    met = not failed and not swaps.mixed and slope_kb < MAX_SLOPE_KB_PER_RELOAD
    table.add_row(
        f"{1e3 * seconds / count:.0f}",
        str(swaps.calls),
        ", ".join(f"{times} {reason}" for reason, times in swaps.failures.items()) or "0",
        str(swaps.mixed),
        *(f"{size:.0f}" for size in (sizes_mb[0], later[0], later[-1])),
        f"{slope_kb:+.1f}",
        "met" if met else "MISSED",
    )
    return table


def network_file(folder: Path, seed: int) -> bytes:
    """Return an ONNX file of the tiny network with such weights."""
    torch.manual_seed(seed)
    path = folder / f"{seed}.onnx"
    torch.onnx.export(TinyNetwork().eval(), (torch.zeros(1, 3, INPUT_PX, INPUT_PX),), path, verbose=False)
    return path.read_bytes()


def main(
    count: Annotated[int, typer.Option(help="How many replacements.", min=10)] = 1000,
) -> None:
    """Print what callers notice of replacements, and how the server's memory goes."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        first, second = network_file(folder, 1), network_file(folder, 2)
        (folder / "tiny.onnx").write_bytes(first)
        with served.serve(_MODEL, within=folder) as service:
            Console(width=120).print(asyncio.run(measure(service, (first, second), count)))


if __name__ == "__main__":
    typer.run(main)
