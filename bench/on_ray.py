"""Replicas on Ray against a plain server on the same cores: `python -m bench.on_ray`.

The plain server takes all cores; replicas take one each, as on nodes of one core. Only one of them runs at a time.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bench import served
from heatlens import Client, HeatlensError

CONCURRENCIES = (1, 8)
PORT = 50072
START_TIMEOUT_S = 300.0


@contextmanager
def on_ray(replicas: int) -> Iterator[str]:
    """Run replicas of one thread each on a cluster of this machine; yield their address."""
    command = [sys.executable, "-m", "heatlens_server", "ray", "--port", str(PORT), "--replicas", str(replicas)]
    environment = {**os.environ, "HEATLENS_SERVER__LOG_LEVEL": "warning", "RAY_SERVE_LOG_TO_STDERR": "0"}
    with TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:  # noqa: PTH123
        process = subprocess.Popen([*command, "--num-cpus", "0.5"], env=environment, stdout=log, stderr=log)
        try:
            with Client(f"127.0.0.1:{PORT}") as client:
                deadline = time.monotonic() + START_TIMEOUT_S
                while True:
                    try:
                        client.models()
                        break
                    except HeatlensError:
                        if time.monotonic() > deadline:
                            raise
                        time.sleep(0.2)
            yield f"127.0.0.1:{PORT}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def plain() -> Iterator[str]:
    """Run a plain server; yield its address."""
    with served.serve() as service:
        yield service.address


def main(
    seconds: Annotated[float, typer.Option(help="How long each load lasts.")] = 6.0,
    turns: Annotated[int, typer.Option(help="How often each is loaded; medians are printed.")] = 3,
) -> None:
    """Print throughput and latency of a plain server, and of one and two replicas on Ray."""
    table = Table(title="embedded model, 256 px pixels")
    for column in ("served by", "concurrency", "images/s", "/ plain", "p50 ms", "p99 ms", "mean batch"):
        table.add_column(column, justify="right")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (served.RESIZED_PX, served.RESIZED_PX, 3), np.uint8) for _ in range(4)]
    rates: dict[int, float] = {}
    for name, running in (("plain", plain()), ("1 replica", on_ray(1)), ("2 replicas", on_ray(2))):
        with running as address:
            for concurrency in CONCURRENCIES:
                served.measure(served.Service(address, 0, None), images, concurrency, seconds=2.0)
                loads = [
                    served.measure(served.Service(address, 0, None), images, concurrency, seconds=seconds)
                    for _ in range(turns)
                ]
                rate = statistics.median(load.images_per_s for load in loads)
                latencies = [value for load in loads for value in load.latencies_ms]
                table.add_row(
                    name,
                    str(concurrency),
                    f"{rate:.1f}",
                    f"{rate / rates.setdefault(concurrency, rate):.2f}",
                    *(f"{np.percentile(latencies, share):.1f}" for share in (50, 99)),
                    f"{statistics.median(load.batch_size for load in loads):.1f}",
                )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
