"""One engine on all cores against one on each core, as two servers that take turns under the same load.

Client and servers share the cores.
"""

import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from bench import served
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
        for column in ("callers", "images/s, one", f"images/s, {cores}", "ratio", "p50 ms, one", f"p50 ms, {cores}"):
            table.add_column(column, justify="right")
        with tempfile.TemporaryDirectory() as folder:
            within = Path(folder)
            # The second finds the export of the first.
            with (
                served.serve(model, within=within) as one,
                served.serve(f"{model}instances = {cores}\n", within=within) as several,
            ):
                for service in (one, several):
                    served.measure(service, images, max(CALLERS), seconds=1.0)
                for callers in CALLERS:
                    loads = [
                        (
                            served.measure(one, images, callers, seconds=seconds),
                            served.measure(several, images, callers, seconds=seconds),
                        )
                        for _ in range(turns)
                    ]
                    speeds = [[load.images_per_s for load in turn] for turn in loads]
                    p50s_ms = [[statistics.median(load.latencies_ms) for load in turn] for turn in loads]
                    table.add_row(
                        str(callers),
                        *(f"{statistics.median(column):.1f}" for column in zip(*speeds, strict=True)),
                        f"{statistics.median(other / first for first, other in speeds):.2f}",
                        *(f"{statistics.median(column):.1f}" for column in zip(*p50s_ms, strict=True)),
                    )
                memory = [_rss_bytes(service.pid) / 1e6 for service in (one, several)]
            with served.serve(f'{model}instances = "auto"\n', within=within) as auto, Client(auto.address) as client:
                said = client.models()[0].assumptions[-1]
        table.caption = f"resident memory: {memory[0]:.0f} and {memory[1]:.0f} MB. auto: {said}"
        yield table


def _rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
