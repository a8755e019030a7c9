"""One engine on all cores against one on each core, as two servers that take turns under the same load.

Client and servers share the cores.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from rich.table import Table

from bench import served
from bench.stream import cpu_s
from heatlens import Client

CALLERS = (1, 4, 16)
MODELS = {
    "efficientnet_lite0": served.DEFAULT_MODEL,
    "resnet18": """
[[models]]
name = "resnet18"
source = "torchvision:resnet18"
weights = "none"
engine = "onnxruntime"
""",
}


def run(*, turns: int, seconds: float) -> Iterator[Table]:
    """Throughput, latency and memory of both, for each model, and what `instances = "auto"` makes of it."""
    cores = len(os.sched_getaffinity(0))
    images = served.workloads()["pixels, 256 px"]
    for name, model in MODELS.items():
        table = Table(title=f"{name}: {cores} instances of one thread each / one of {cores} threads, pixels of 256 px")
        for column in ("callers", "images/s", "ratio", "p50 ms", "server CPU per image, ms"):
            table.add_column(column, justify="right")
        with tempfile.TemporaryDirectory() as folder:
            within = Path(folder)
            # The second finds the export of the first.
            with (
                served.serve(model, within=within) as one,
                served.serve(f"{model}instances = {cores}\n", within=within) as several,
            ):
                pair = (one, several)
                for service in pair:
                    served.measure(service, images, max(CALLERS), seconds=1.0)
                for callers in CALLERS:
                    found: list[list[tuple[float, float, float]]] = [[], []]
                    for turn in range(turns):
                        # Who begins changes: the first finds the machine as the one before left it.
                        for place in (turn % 2, (turn + 1) % 2):
                            found[place].append(_load(pair[place], images, callers, seconds=seconds))
                    rates, p50s_ms, cpu_ms = (
                        " and ".join(f"{statistics.median(turn[i] for turn in of_one):.1f}" for of_one in found)
                        for i in range(3)
                    )
                    ratio = statistics.median(
                        other[0] / first[0] for first, other in zip(found[0], found[1], strict=True)
                    )
                    table.add_row(str(callers), rates, f"{ratio:.2f}", p50s_ms, cpu_ms)
                memory = [psutil.Process(service.pid).memory_info().rss / 1e6 for service in pair]
            with served.serve(f'{model}instances = "auto"\n', within=within) as auto, Client(auto.address) as client:
                said = client.models()[0].assumptions[-1]
        table.caption = f"resident memory: {memory[0]:.0f} and {memory[1]:.0f} MB. auto: {said}"
        yield table


def _load(
    service: served.Service, images: served.Images, callers: int, *, seconds: float
) -> tuple[float, float, float]:
    """Images a second, the median latency and the server's CPU time of an image, the two in milliseconds."""
    process = psutil.Process(service.pid)
    before_s = cpu_s(process)
    load = served.measure(service, images, callers, seconds=seconds)
    cpu_ms = (cpu_s(process) - before_s) / len(load.timings) * 1e3
    return load.images_per_s, statistics.median(load.latencies_ms), cpu_ms
