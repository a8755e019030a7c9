"""The whole service against its own engine in process, and where the time of a call goes.

The server runs in a process of its own, the client in this one, both on the same cores. Baseline and service take
turns, so that a machine that slows down slows both.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import uvloop
from rich.table import Table

from bench.models import photo_paths
from bench.wire import encode_ms
from heatlens import AsyncClient, Client, Timing
from heatlens._cli.report import batch_size_of
from heatlens_server.config import load_config
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import TopK
from heatlens_server.fleet.build import build
from heatlens_server.imaging.decode import decode_image
from heatlens_server.imaging.preprocess import fit

CONCURRENCIES = (1, 8, 32)
MIN_OF_ENGINE = 0.85
TARGET_CONCURRENCY = 8
JPEG_QUALITY = 90
RESIZED_PX = 256
"""What the embedded model's transform resizes the shorter side to."""

DEFAULT_MODEL = """
[[models]]
name = "efficientnet_lite0"
source = "embedded:efficientnet_lite0"
"""

_SERVER = """
[server]
listen = "127.0.0.1:0"
log_level = "warning"
max_queue_length = 64
cache_dir = "cache"
"""
_ROOT = Path(__file__).parents[1]

Images = Sequence[np.ndarray | bytes]


@dataclass(frozen=True, slots=True)
class Service:
    """A server that runs.

    Attributes:
        address: where.
        pid: of its process.
        folder: its configuration and its cache.
    """

    address: str
    pid: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Load:
    """One measured closed loop."""

    images_per_s: float
    latencies_ms: list[float]
    timings: list[Timing]

    @property
    def batch_size(self) -> float:
        """Mean over batches, not over images: each batch of n answers n times."""
        size = batch_size_of(self.timings)
        if size is None:
            raise RuntimeError("nothing was explained")
        return size


def run(service: Service, *, turns: int, seconds: float) -> list[Table]:
    """Measure and tabulate throughput and the shares of a call's time."""
    ratios = Table(title="served throughput / engine in process at the batch size reached (efficientnet_lite0)")
    for column in ("images", "concurrency", "images/s", "mean batch", "/ in process", "target"):
        ratios.add_column(column, justify="right")
    shares = Table(title="where a call's time goes, median ms (share)")
    for column in ("images", "concurrency", "latency", "decode + resize", "queue", "compute", "encode", "rest"):
        shares.add_column(column, justify="right")
    engine = InProcess(service)
    for kind, images in workloads().items():
        for concurrency in CONCURRENCIES:
            measure(service, images, concurrency, seconds=1.0)
            pairs: list[float] = []
            loads: list[Load] = []
            for _ in range(turns):
                load = measure(service, images, concurrency, seconds=seconds)
                loads.append(load)
                pairs.append(load.images_per_s / engine.images_per_s(images, load.batch_size, seconds=seconds))
            ratios.add_row(*_ratio_row(kind, concurrency, loads, pairs))
            shares.add_row(kind, str(concurrency), *_shares(loads))
    ratios.caption = (
        "in process = decode (JPEG), resize (photos) and engine one after the other, on one thread that shares all "
        "cores inside torch; at 256 px there is nothing to decode or resize, so it is the engine alone. Targets at "
        f"concurrency {TARGET_CONCURRENCY}, 256 px and JPEG: >= {MIN_OF_ENGINE}x."
    )
    return [ratios, shares]


def workloads() -> Mapping[str, Images]:
    """The images that are sent, by kind."""
    jpegs = _jpegs()
    photos = [decode_image(jpeg, max_pixels=1 << 26).values for jpeg in jpegs]
    return {
        # Already at the size that the model's transform resizes to: no resizing on either side.
        "pixels, 256 px": [cv2.resize(photo, (RESIZED_PX, RESIZED_PX)) for photo in photos],
        "pixels, photo": photos,
        "JPEG": jpegs,
    }


class InProcess:
    """The engine of a service's first model, without a service around it."""

    def __init__(self, service: Service) -> None:
        # After the server, whose export it finds.
        built = build(load_config(service.folder / "server.toml").models[0], cache_dir=service.folder / "cache")
        self._preprocess, self._engine = built.preprocess, built.engine
        self._spec = MapSpec(built.method, built.engine.info.layers[:1], upsample=False)

    def images_per_s(self, images: Images, batch_size: float, *, seconds: float) -> float:
        """Throughput, decoding and resizing included, at a (fractional) batch size."""
        return 1 / self._image_s(images, batch_size, time.perf_counter, seconds=seconds)

    def cpu_s(self, images: Images, batch_size: float, *, seconds: float) -> float:
        """CPU seconds of all threads for one image at a (fractional) batch size."""
        return self._image_s(images, batch_size, time.process_time, seconds=seconds)

    def _image_s(self, images: Images, batch_size: float, clock: Callable[[], float], *, seconds: float) -> float:
        """Time per image: the two whole batch sizes around the one wanted, mixed to the same mean."""
        low = max(1, int(batch_size))
        share_of_high = batch_size - low
        low_s = self._batch_s(images, low, clock, seconds=seconds / 2)
        high_s = self._batch_s(images, low + 1, clock, seconds=seconds / 2) if share_of_high > 0.05 else low_s
        return (low_s * (1 - share_of_high) + high_s * share_of_high) / batch_size

    def _batch_s(self, images: Images, batch_size: int, clock: Callable[[], float], *, seconds: float) -> float:
        batch = [images[i % len(images)] for i in range(batch_size)]
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 3:
            started = clock()
            pixels = [self._pixels(image) for image in batch]
            self._engine.explain(np.stack(pixels), [TopK(1)] * batch_size, self._spec)
            times.append(clock() - started)
        return statistics.median(times)

    def _pixels(self, image: np.ndarray | bytes) -> np.ndarray:
        if isinstance(image, bytes):
            image = decode_image(image, max_pixels=1 << 26).values
        return fit(image, self._preprocess).pixels


def measure(service: Service, images: Images, concurrency: int, *, seconds: float) -> Load:
    """Run a closed loop of calls on uvloop, as the server does: the client shares its cores."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_closed_loop(service.address, images, concurrency, seconds=seconds))


async def _closed_loop(address: str, images: Images, concurrency: int, *, seconds: float) -> Load:
    """Keep `concurrency` calls in flight for a while."""
    timings: list[Timing] = []
    latencies_ms: list[float] = []
    async with AsyncClient(address) as client:
        started = time.perf_counter()

        async def caller(first: int) -> None:
            i = first
            while time.perf_counter() - started < seconds:
                sent = time.perf_counter()
                timings.append((await client.explain(images[i % len(images)])).timing)
                latencies_ms.append((time.perf_counter() - sent) * 1e3)
                i += concurrency

        await asyncio.gather(*(caller(i) for i in range(concurrency)))
        elapsed = time.perf_counter() - started
    return Load(len(timings) / elapsed, latencies_ms, timings)


def _ratio_row(kind: str, concurrency: int, loads: Sequence[Load], pairs: Sequence[float]) -> list[str]:
    ratio = statistics.median(pairs)
    verdict = ("met" if ratio >= MIN_OF_ENGINE else "MISSED") if concurrency == TARGET_CONCURRENCY else ""
    return [
        kind,
        str(concurrency),
        f"{statistics.median(load.images_per_s for load in loads):.1f}",
        f"{statistics.median(load.batch_size for load in loads):.1f}",
        f"{ratio:.3f}",
        verdict,
    ]


def _shares(loads: Sequence[Load]) -> list[str]:
    latency = statistics.median(value for load in loads for value in load.latencies_ms)
    timings = [timing for load in loads for timing in load.timings]
    parts = [
        statistics.median(t.preprocess_ms for t in timings),
        statistics.median(t.queue_ms for t in timings),
        statistics.median(t.compute_ms for t in timings),
        encode_ms(),
    ]
    parts.append(max(0.0, latency - sum(parts)))
    return [f"{latency:.1f}", *(f"{part:.2f} ({part / latency:.0%})" for part in parts)]


def _jpegs() -> list[bytes]:
    return [
        cv2.imencode(".jpg", cv2.imread(str(path)), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
        for path in photo_paths()
    ]


@contextmanager
def serve(models: str = DEFAULT_MODEL, *, within: Path | None = None) -> Iterator[Service]:
    """Run a server in a process of its own.

    Args:
        models: the [[models]] of its configuration, TOML.
        within: its folder, whose cache it uses; None for an empty one.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = within or Path(name)
        config, port_file = folder / "server.toml", Path(name) / "port"
        config.write_text(_SERVER + models)
        process = subprocess.Popen(
            [sys.executable, "-m", "heatlens_server", "serve", "-c", str(config), "--port-file", str(port_file)],
            # So that it finds networks of this package.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.getenv("PYTHONPATH")])])},
        )
        try:
            while not (port_file.exists() and port_file.read_text().endswith("\n")):
                if process.poll() is not None:
                    raise RuntimeError("the server did not start")
                time.sleep(0.05)
            address = f"127.0.0.1:{port_file.read_text().strip()}"
            with Client(address) as client:
                while client.health() != "serving":
                    time.sleep(0.05)
            yield Service(address, process.pid, folder)
        finally:
            process.terminate()
            process.wait()
