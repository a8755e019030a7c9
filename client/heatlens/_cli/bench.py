"""`heatlens bench`: measure a server from where its clients are."""

import asyncio
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from heatlens._async_client import AsyncClient
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    ClientOptions,
    JsonOption,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    fail,
    reporting,
)
from heatlens._cli.load import (
    Report,
    Sample,
    closed_loop,
    constant_arrivals,
    open_loop,
    poisson_arrivals,
    summarise,
)
from heatlens._exceptions import HeatlensError
from heatlens._images import load_image
from heatlens._options import Retry
from heatlens._results import Timing

_DEFAULT_CONCURRENCY = 8
_DEFAULT_DURATION_S = 10.0


class Arrivals(StrEnum):
    """How calls of an open loop are spaced."""

    POISSON = "poisson"
    CONSTANT = "constant"


def bench(
    *,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", show_default="a synthetic one", help="Images, sent in turn.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    model: Annotated[str | None, typer.Option(show_default="the server's", help="A served model.")] = None,
    method: Annotated[str | None, typer.Option(show_default="the model's", help="grad-cam, layer-cam, ...")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Explain the N most probable classes.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default="8", help="Closed loop: calls kept open.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(metavar="R", help="Open loop: calls started per second, whatever happens.")
    ] = None,
    arrivals: Annotated[Arrivals, typer.Option(help="Open loop: spacing of the calls.")] = Arrivals.POISSON,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the Poisson arrivals.")] = 0,
    requests: Annotated[int | None, typer.Option(metavar="N", min=1, help="Stop after N calls.")] = None,
    duration: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", show_default="10, without --requests", help="Stop after this time."),
    ] = None,
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
) -> None:
    """Measure throughput and latency. Calls are not retried: a refusal counts as what it is.

    Latency of an open loop counts from the scheduled start. Exits with 1 if no call succeeded.
    """
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("give --concurrency (closed loop) or --rate (open loop), not both")
    # nan compares false with everything.
    if not all(value is None or 0 < value < math.inf for value in (rate, duration)):
        raise typer.BadParameter("--rate and --duration must be positive and finite")
    duration_s = _DEFAULT_DURATION_S if duration is None and requests is None else duration
    with reporting():
        payloads = [load_image(path) for path in images or ()] or [synthetic_jpeg()]
        options = client_options(server, tls=tls, ca=ca, timeout=timeout)
        what = {"model": model, "method": method, "top_k": top_k}
        samples, elapsed_s = asyncio.run(
            _run(
                options,
                payloads,
                what,
                concurrency=concurrency or _DEFAULT_CONCURRENCY,
                starts=None if rate is None else _starts(rate, arrivals, seed),
                requests=requests,
                duration_s=duration_s,
            )
        )
    report = summarise(samples, elapsed_s)
    mode: dict[str, Any] = (
        {"loop": "closed", "concurrency": concurrency or _DEFAULT_CONCURRENCY}
        if rate is None
        else {"loop": "open", "rate_per_s": rate, "arrivals": arrivals.value}
    )
    typer.echo(json.dumps(mode | asdict(report), indent=2) if as_json else _as_text(mode, report))
    if report.latency is None:
        fail("no call succeeded")


def synthetic_jpeg() -> bytes:
    """Return a 640x480 JPEG of smooth seeded noise, about as hard to decode as a photo."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _starts(rate: float, arrivals: Arrivals, seed: int) -> Iterator[float]:
    return constant_arrivals(rate) if arrivals is Arrivals.CONSTANT else poisson_arrivals(rate, seed)


async def _run(
    options: ClientOptions,
    payloads: list[Any],
    what: dict[str, Any],
    *,
    concurrency: int,
    starts: Iterator[float] | None,
    requests: int | None,
    duration_s: float | None,
) -> tuple[list[Sample], float]:
    turns = itertools.cycle(payloads)
    async with AsyncClient(**options, retry=Retry(max_attempts=1)) as client:

        async def call() -> Timing:
            return (await client.explain(next(turns), **what)).timing

        # One call that does not count: it connects, and tells of a wrong model or a missing server at once.
        try:
            await call()
        except HeatlensError as error:
            if error.code not in {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}:
                raise
        with _progress(requests) as advance:
            if starts is None:
                return await closed_loop(
                    call, concurrency=concurrency, requests=requests, duration_s=duration_s, on_done=advance
                )
            return await open_loop(call, arrivals=starts, requests=requests, duration_s=duration_s, on_done=advance)


@contextmanager
def _progress(total: int | None) -> Iterator[Any]:
    """Show progress on stderr if that is a terminal; yields what to call after each answer."""
    console = Console(stderr=True)
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _as_text(mode: dict[str, Any], report: Report) -> str:
    head = (
        f"closed loop, {mode['concurrency']} in flight"
        if mode["loop"] == "closed"
        else f"open loop, {mode['rate_per_s']:g}/s {mode['arrivals']}"
    )
    lines = [
        f"{head}: {report.requests} calls in {report.elapsed_s:.2f} s",
        f"  throughput   {report.throughput_per_s:.1f}/s",
        f"  codes        {', '.join(f'{code} {count}' for code, count in report.codes.items())}",
    ]
    if report.latency is not None:
        latency = report.latency
        lines.append(
            f"  latency ms   mean {latency.mean_ms:.1f}, p50 {latency.p50_ms:.1f}, p90 {latency.p90_ms:.1f}, "
            f"p95 {latency.p95_ms:.1f}, p99 {latency.p99_ms:.1f}, max {latency.max_ms:.1f}"
        )
    if report.mean_queue_ms is not None:
        lines.append(
            f"  server ms    queue {report.mean_queue_ms:.1f}, preprocess {report.mean_preprocess_ms:.1f}, "
            f"compute {report.mean_compute_ms:.1f}"
        )
    if report.mean_batch_size is not None:
        lines.append(f"  batch size   {report.mean_batch_size:.2f}")
    lines.append(f"  start lag    {report.p99_lag_ms:.1f} ms p99")
    return "\n".join(lines)
