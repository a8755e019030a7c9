"""Streams against calls on the same frames, against the engine in process, and what the server spends per frame.

As in `bench.served`, the server runs in a process of its own and shares the cores with the client in this one, and what
is compared takes turns. The client is the one that `heatlens bench --stream` runs.
"""

import asyncio
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import psutil
import uvloop
from rich.table import Table

from bench import tiny_network
from bench.bare_stream import serve_bare
from bench.served import MIN_OF_ENGINE, Images, InProcess, Load, Service, measure, serve, workloads
from heatlens import AsyncClient
from heatlens._cli.load import Sources, run_streams
from heatlens._cli.report import summarise

STREAMS = (1, 4, 16)
WINDOW = 8
MIN_OF_CALLS = 0.95
MAX_OVERHEAD_MS = 0.5

TINY_MODEL = f"""
[[models]]
name = "tiny"
source = "python:{tiny_network.__name__}:{tiny_network.tiny_network.__name__}"
engine = "onnxruntime"
layers = ["{tiny_network.LAYER}"]
[models.preprocess]
resize_px = {tiny_network.INPUT_PX}
crop_px = {tiny_network.INPUT_PX}
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
"""


def run(service: Service, *, turns: int, seconds: float) -> list[Table]:
    """Measure and tabulate.

    Args:
        service: serves the default model.
        turns: how often each candidate runs, about.
        seconds: how long each load lasts.
    """
    kinds = workloads()
    engine = InProcess(service)
    against_calls = _table(
        f"one stream, window {WINDOW} / calls, concurrency {WINDOW}, on the same frames (efficientnet_lite0)",
        ("frames", "calls/s", "mean batch", "stream frames/s", "mean batch", "stream / calls", "target"),
    )
    against_calls.caption = f"Median of {turns} pairs, which begin with either in turn. Target: >= {MIN_OF_CALLS}."
    against_engine = _table(
        f"streams, window {WINDOW} each / in process at the batch size reached (efficientnet_lite0)",
        ("frames", "streams", "frames/s", "mean batch", "/ in process", "target"),
    )
    against_engine.caption = (
        "All streams together. In process = decode (JPEG), resize (photos) and engine one after the other, as in the "
        f"table of calls. Target: >= {MIN_OF_ENGINE}."
    )
    for kind, frames in kinds.items():
        against_calls.add_row(kind, *_against_calls(service, frames, turns=turns, seconds=seconds))
        for streams in STREAMS:
            row = _against_engine(service, engine, frames, streams, turns=max(3, turns // 2), seconds=seconds)
            against_engine.add_row(kind, str(streams), *row)
    return [against_calls, against_engine, _overhead(turns=max(3, turns // 2), seconds=seconds)]


def measure_streams(service: Service, frames: Images, streams: int, *, window: int, seconds: float) -> Load:
    """Run a closed loop of streams on uvloop, as the server does: their windows are always full."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_closed_loop(service.address, frames, streams, window=window, seconds=seconds))


async def _closed_loop(address: str, frames: Images, streams: int, *, window: int, seconds: float) -> Load:
    sources = Sources(frames, fps=None, duration_s=seconds, drop_oldest=False)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(address))
        opened = [await stack.enter_async_context(client.stream(max_in_flight=window)) for _ in range(streams)]
        traces, elapsed_s = await run_streams(opened, sources)
    report = summarise(traces, elapsed_s)
    if report.total.explained != report.total.captured:
        raise RuntimeError(f"not every frame was explained: {report.total}")
    samples = [sample for trace in traces for sample in trace.samples]
    return Load(
        report.total.explained_per_s,
        [sample.age_s * 1e3 for sample in samples],
        [sample.timing for sample in samples if sample.timing is not None],
    )


def _against_calls(service: Service, frames: Images, *, turns: int, seconds: float) -> list[str]:
    def calls(for_s: float) -> Load:
        return measure(service, frames, WINDOW, seconds=for_s)

    def stream(for_s: float) -> Load:
        return measure_streams(service, frames, 1, window=WINDOW, seconds=for_s)

    calls(1.0)
    stream(1.0)
    called: list[Load] = []
    streamed: list[Load] = []
    for turn in range(turns):
        # Whichever comes second may find the machine warmer: they take turns at that too.
        for load, loads in ((calls, called), (stream, streamed))[:: 1 if turn % 2 == 0 else -1]:
            loads.append(load(seconds))
    ratio = statistics.median(s.images_per_s / c.images_per_s for s, c in zip(streamed, called, strict=True))
    return [*_rate(called), *_rate(streamed), f"{ratio:.3f}", "met" if ratio >= MIN_OF_CALLS else "MISSED"]


def _against_engine(
    service: Service, engine: InProcess, frames: Images, streams: int, *, turns: int, seconds: float
) -> list[str]:
    measure_streams(service, frames, streams, window=WINDOW, seconds=1.0)
    loads: list[Load] = []
    pairs: list[float] = []
    for _ in range(turns):
        load = measure_streams(service, frames, streams, window=WINDOW, seconds=seconds)
        loads.append(load)
        pairs.append(load.images_per_s / engine.images_per_s(frames, load.batch_size, seconds=seconds))
    ratio = statistics.median(pairs)
    return [*_rate(loads), f"{ratio:.3f}", "met" if ratio >= MIN_OF_ENGINE else "MISSED"]


def _overhead(*, turns: int, seconds: float) -> Table:
    """What the server spends on a frame besides preparing it and running the network."""
    table = _table(
        "server CPU per frame besides preprocessing and compute, ms (a tiny network, raw frames of its input size)",
        ("load", "frames/s", "mean batch", "server", "preprocessing + compute", "overhead", "target"),
    )
    table.caption = (
        "server = user and system time of the server's process, all threads, per frame answered. preprocessing + "
        "compute = CPU time of the same calls made in process at the batch size reached; not the wall times that "
        "answers report, which hold the wait for a core or for Python's lock. overhead = the difference: gRPC, reading "
        "and checking frames, the stream's order and window, the queue, threads waking each other, softmax, building "
        f"and sending answers, and all that the network's run costs more there than alone. Target, one stream with "
        f"window {WINDOW}: <= {MAX_OVERHEAD_MS} ms."
    )
    side_px = tiny_network.INPUT_PX
    frames = list(np.random.default_rng(0).integers(0, 256, (16, side_px, side_px, 3), dtype=np.uint8))
    with serve(TINY_MODEL) as service:
        engine = InProcess(service)

        def streams(count: int, window: int) -> Callable[[float], Load]:
            return lambda for_s: measure_streams(service, frames, count, window=window, seconds=for_s)

        judged = f"1 stream, window {WINDOW}"
        loads: dict[str, Callable[[float], Load]] = {
            "1 stream, window 1": streams(1, 1),
            judged: streams(1, WINDOW),
            f"{STREAMS[-1]} streams, window {WINDOW}": streams(STREAMS[-1], WINDOW),
            f"calls, concurrency {WINDOW}": lambda for_s: measure(service, frames, WINDOW, seconds=for_s),
        }
        process = psutil.Process(service.pid)
        for name, load in loads.items():
            load(1.0)
            measured: list[Load] = []
            spent_ms: list[float] = []
            alone_ms: list[float] = []
            for _ in range(turns):
                before_s = cpu_s(process)
                measured.append(load(seconds))
                spent_ms.append((cpu_s(process) - before_s) / len(measured[-1].timings) * 1e3)
                alone_ms.append(engine.cpu_s(frames, measured[-1].batch_size, seconds=seconds / 2) * 1e3)
            overhead_ms = statistics.median(spent - alone for spent, alone in zip(spent_ms, alone_ms, strict=True))
            verdict = ("met" if overhead_ms <= MAX_OVERHEAD_MS else "MISSED") if name == judged else ""
            numbers = (statistics.median(spent_ms), statistics.median(alone_ms), overhead_ms)
            table.add_row(name, *_rate(measured), *(f"{number:.3f}" for number in numbers), verdict)
    table.add_section()
    table.add_row(f"gRPC alone, {judged}", *_bare(frames, turns=turns, seconds=seconds), "")
    return table


def _bare(frames: Images, *, turns: int, seconds: float) -> list[str]:
    """What a server that does nothing but answer spends."""
    measured: list[Load] = []
    spent_ms: list[float] = []
    with serve_bare() as (address, pid), tempfile.TemporaryDirectory() as folder:
        process, service = psutil.Process(pid), Service(address, pid, Path(folder))
        measure_streams(service, frames, 1, window=WINDOW, seconds=1.0)
        for _ in range(turns):
            before_s = cpu_s(process)
            measured.append(measure_streams(service, frames, 1, window=WINDOW, seconds=seconds))
            spent_ms.append((cpu_s(process) - before_s) / len(measured[-1].timings) * 1e3)
    spent = f"{statistics.median(spent_ms):.3f}"
    return [f"{statistics.median(load.images_per_s for load in measured):.1f}", "", spent, "", spent]


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process so far, on all its cores."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _rate(loads: Sequence[Load]) -> list[str]:
    """Images per second and mean batch size, medians."""
    return [
        f"{statistics.median(load.images_per_s for load in loads):.1f}",
        f"{statistics.median(load.batch_size for load in loads):.1f}",
    ]


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    return table
