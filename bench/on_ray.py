"""What Ray costs: replicas against a plain server, and actors of Ray Data against an engine, on the same cores.

The plain server takes all cores; replicas take one each, as on nodes of one core. Only one of them runs at a time.
"""

import math
import operator
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import ray
from rich.table import Table

from bench import served
from examples.ray_demo import wait_until_it_answers
from heatlens import Client
from heatlens_server.bulk import Column, Explainer

CONCURRENCIES = (1, 8)
PORT = 50072
MIN_OF_ENGINE = 0.9
ROWS = 64
"""Images that Ray Data gives to an actor at a time."""
BATCH = 16
"""Images that the engine runs at a time: the default."""


def run(*, turns: int, seconds: float) -> list[Table]:
    """Measure and tabulate throughput of both."""
    return [_replicas(turns=turns, seconds=seconds), _actors(turns=turns, seconds=seconds)]


@contextmanager
def on_ray(replicas: int) -> Iterator[str]:
    """Run replicas of one thread each on a cluster of this machine; yield their address."""
    command = [sys.executable, "-m", "heatlens_server", "ray", "--port", str(PORT), "--replicas", str(replicas)]
    environment = {**os.environ, "HEATLENS_SERVER__LOG_LEVEL": "warning", "RAY_SERVE_LOG_TO_STDERR": "0"}
    with TemporaryDirectory() as folder, open(f"{folder}/log", "w") as log:  # noqa: PTH123
        process = subprocess.Popen([*command, "--num-cpus", "0.5"], env=environment, stdout=log, stderr=log)
        try:
            with Client(f"127.0.0.1:{PORT}") as client:
                wait_until_it_answers(client)
            yield f"127.0.0.1:{PORT}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def plain() -> Iterator[str]:
    """Run a plain server; yield its address."""
    with served.serve() as service:
        yield service.address


def _replicas(*, turns: int, seconds: float) -> Table:
    table = Table(title="replicas on Ray / a plain server (embedded model, 256 px pixels)")
    for column in ("served by", "concurrency", "images/s", "/ plain", "p50 ms", "p99 ms", "mean batch"):
        table.add_column(column, justify="right")
    images = served.workloads()["pixels, 256 px"]
    rates: dict[int, float] = {}
    for name, running in (("plain", plain()), ("1 replica", on_ray(1)), ("2 replicas", on_ray(2))):
        with running as address:
            for concurrency in CONCURRENCIES:
                service = served.Service(address, 0, Path())
                served.measure(service, images, concurrency, seconds=2.0)
                loads = [served.measure(service, images, concurrency, seconds=seconds) for _ in range(turns)]
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
    return table


class Timed(Explainer):
    """Says of each row when its batch was done, by whom, and how much CPU time that process had taken by then."""

    def __call__(self, batch: Mapping[str, Column]) -> dict[str, Column]:
        """As `Explainer`, with three columns more."""
        done = super().__call__(batch)
        said = {"pid": os.getpid(), "done_s": time.monotonic(), "cpu_s": time.process_time()}
        return done | {name: np.full(len(done["error"]), value) for name, value in said.items()}


def _actors(*, turns: int, seconds: float) -> Table:
    table = Table(title="actors of Ray Data / one engine in process (embedded model, JPEG)")
    for column in ("actors", "cores each", "images/s", "engine's", "/ engine", "target", "CPU / engine's"):
        table.add_column(column, justify="right")
    jpegs, cores = served.workloads()["JPEG"], os.cpu_count() or 1
    ray.data.DataContext.get_current().enable_progress_bars = False
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "server.toml").write_text(served.DEFAULT_MODEL)
        engine = served.InProcess(served.Service("", 0, folder))
        # One more than there are: reading and writing are tasks, too.
        ray.init(num_cpus=cores + 1, include_dashboard=False, log_to_driver=False)
        for actors in (1, 2):
            pairs = []
            for turn in range(turns):
                own = engine.images_per_s(jpegs, BATCH, seconds=seconds), engine.cpu_s(jpegs, BATCH, seconds=seconds)
                count = math.ceil(own[0] * seconds / ROWS + 2 * actors) * ROWS
                images = ray.data.from_items([{"image": jpegs[i % len(jpegs)]} for i in range(count)])
                images.map_batches(
                    Timed,
                    fn_constructor_kwargs={"config": str(folder / "server.toml")},
                    batch_size=ROWS,
                    compute=ray.data.ActorPoolStrategy(size=actors),
                    num_cpus=cores / actors,
                ).write_parquet(f"{folder}/{actors}-{turn}")
                pairs.append((*_rate(folder / f"{actors}-{turn}"), *own))
            rates, cpus_s, own_rates, own_cpus_s = zip(*pairs, strict=True)
            ratio = statistics.median(map(operator.truediv, rates, own_rates))
            table.add_row(
                str(actors),
                f"{cores / actors:g}",
                *(f"{statistics.median(values):.1f}" for values in (rates, own_rates)),
                f"{ratio:.3f}",
                "met" if ratio >= MIN_OF_ENGINE else "MISSED",
                f"{statistics.median(map(operator.truediv, cpus_s, own_cpus_s)):.2f}",
            )
        ray.shutdown()
    table.caption = (
        f"in process = decode, resize and engine one after the other, in batches of {BATCH}. Actors: from the end of "
        f"each one's first {ROWS} images to that of its last, which are written as Parquet. Target: >= {MIN_OF_ENGINE}."
    )
    return table


def _rate(folder: Path) -> tuple[float, float]:
    """Images a second of all actors that wrote a table, without their start, and their CPU seconds for one."""
    table = pq.read_table(folder, columns=["pid", "done_s", "cpu_s"])
    rows = np.stack([column.to_numpy() for column in table.columns])
    rate, count, cpu_s = 0.0, 0, 0.0
    for _, done_s, used_s in (rows[:, rows[0] == pid] for pid in np.unique(rows[0])):
        own = int((done_s > done_s.min()).sum())
        rate += own / np.ptp(done_s)
        count += own
        cpu_s += np.ptp(used_s)
    return rate, cpu_s / count
