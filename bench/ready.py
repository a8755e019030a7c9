"""From a start to the first answer, and what callers notice of the engine that takes over: `python -m bench.ready`.

The server and a caller that calls one after the other are processes of their own; a start whose cache is empty, and
then one that finds the export.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench import served
from bench.models import photo_paths
from heatlens import Client, HeatlensError, Retry

MAX_READY_S = 5.0

_MODEL = """
[[models]]
name = "{name}"
source = "torchvision:{name}"
weights = "none"
"""


def measure(service: served.Service, started_s: float) -> list[str]:
    """Call until the engine that stays has answered for a while; return a row of the table."""
    photo = photo_paths()[0].read_bytes()
    took_ms: dict[str, list[float]] = {}
    failed = 0
    with Client(service.address, retry=Retry(max_attempts=1)) as client:
        client.explain(photo)
        ready_s = time.perf_counter() - started_s
        first = client.models()[0]
        swapped_s = 0.0
        end = time.perf_counter() + 3.0
        engine = first.engine
        while (first.next_engine and not swapped_s) or time.perf_counter() < end:
            before = time.perf_counter()
            try:
                client.explain(photo)
            except HeatlensError:
                failed += 1
            took_ms.setdefault(engine, []).append(1e3 * (time.perf_counter() - before))
            if not swapped_s and (engine := client.models()[0].engine) != first.engine:
                swapped_s, end = time.perf_counter() - started_s, time.perf_counter() + 3.0
    calls = ", ".join(
        f"{name} {statistics.median(took):.0f} (longest {max(took):.0f})" for name, took in took_ms.items()
    )
    return [
        f"{ready_s:.1f}",
        f"{swapped_s:.1f}" if swapped_s else "-",
        calls,
        f"{failed} of {sum(map(len, took_ms.values()))}",
        "met" if ready_s <= MAX_READY_S and not failed else "MISSED",
    ]


def main(
    name: Annotated[str, typer.Option(help="A network of torchvision; its weights are random.")] = "resnet50",
) -> None:
    """Print how long it takes until a model answers, and until onnxruntime has taken over."""
    table = Table(title=f"{name}, one caller that calls one after the other")
    for column in ("start", "first answer s", "takes over s", "ms per call", "failed", f"target {MAX_READY_S:g} s"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for start in ("empty cache", "export in the cache"):
            started_s = time.perf_counter()
            with served.serve(_MODEL.format(name=name), within=Path(folder)) as service:
                table.add_row(start, *measure(service, started_s))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
