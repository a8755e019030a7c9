"""`heatlens bench`: measure a server from where its clients are."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from heatlens._cli.bench_calls import Arrivals, CallLoad, calls_as_json, calls_as_text, run_calls
from heatlens._cli.bench_stream import StreamLoad, run_stream_load, streams_as_json, streams_as_text
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    JsonOption,
    Overflow,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    fail,
    reporting,
)
from heatlens._cli.stream_load import Sources
from heatlens._results.images import load_image

_DEFAULT_CONCURRENCY = 8
_DEFAULT_DURATION_S = 10.0
# A source is a loop in Python: beyond this it does not keep up by far.
_MAX_FPS = 1e6


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
    stream: Annotated[bool, typer.Option("--stream", help="Streams instead of calls: frames, answered in order.")] = (
        False
    ),
    streams: Annotated[
        int | None, typer.Option(metavar="S", min=1, show_default="1", help="With --stream: streams kept open.")
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            show_default="0",
            help="With --stream: frames captured per second by each, whatever happens; 0: as fast as the window "
            "allows.",
        ),
    ] = None,
    max_in_flight: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="the server's", help="With --stream: most unanswered frames."),
    ] = None,
    overflow: Annotated[
        Overflow | None,
        typer.Option(
            show_default="block", help="With --stream: frames too many: wait for the server, or drop the oldest."
        ),
    ] = None,
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

    Latency of an open loop counts from the scheduled start. With --stream, a frame's age counts from its capture.
    Exits with 1 if nothing was explained.
    """
    # nan compares false with everything.
    if not all(value is None or 0 < value < math.inf for value in (rate, duration)):
        raise typer.BadParameter("--rate and --duration must be positive and finite")
    duration_s = _DEFAULT_DURATION_S if duration is None and requests is None else duration
    what = {"model": model, "method": method, "top_k": top_k}
    if not stream:
        if any(value is not None for value in (streams, fps, max_in_flight, overflow)):
            raise typer.BadParameter("--streams, --fps, --max-in-flight and --overflow need --stream")
        if rate is not None and concurrency is not None:
            raise typer.BadParameter("give --concurrency (closed loop) or --rate (open loop), not both")
        load = CallLoad(
            concurrency=concurrency or _DEFAULT_CONCURRENCY,
            rate_per_s=rate,
            arrivals=arrivals,
            seed=seed,
            requests=requests,
            duration_s=duration_s,
        )
        with reporting(), _progress(requests) as advance:
            options = client_options(server, tls=tls, ca=ca, timeout=timeout)
            report = asyncio.run(run_calls(options, _payloads(images), what, load, on_answer=advance))
        _print(calls_as_json(load, report) if as_json else calls_as_text(load, report))
        if report.latency is None:
            fail("no call succeeded")
        return
    if any(value is not None for value in (concurrency, rate, requests)):
        raise typer.BadParameter("--concurrency, --rate and --requests are of calls: not with --stream")
    with reporting():
        stream_load = StreamLoad(
            streams=streams or 1,
            sources=_sources(_payloads(images), fps, duration_s or _DEFAULT_DURATION_S, overflow),
            max_in_flight=max_in_flight,
            frame_timeout_s=timeout,
        )
        with _progress(stream_load.captures) as advance:
            options = client_options(server, tls=tls, ca=ca, timeout=timeout)
            found, window = asyncio.run(run_stream_load(options, what, stream_load, on_answer=advance))
    _print(streams_as_json(stream_load, found, window) if as_json else streams_as_text(stream_load, found, window))
    if found.total.age is None:
        fail("no frame was explained")


def synthetic_jpeg() -> bytes:
    """Return a 640x480 JPEG of smooth seeded noise, about as hard to decode as a photo."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _payloads(images: list[Path] | None) -> list[Any]:
    return [load_image(path) for path in images or ()] or [synthetic_jpeg()]


def _sources(payloads: list[Any], fps: float | None, duration_s: float, overflow: Overflow | None) -> Sources:
    if not (fps is None or fps == 0 or 1 / _MAX_FPS <= fps <= _MAX_FPS):
        raise typer.BadParameter(f"--fps must be 0, or from {1 / _MAX_FPS:g} to {_MAX_FPS:g}")
    drop_oldest = overflow is Overflow.DROP_OLDEST
    if drop_oldest and not fps:
        raise typer.BadParameter("--overflow drop-oldest needs --fps: without a rate there is no end of frames to drop")
    return Sources(payloads, fps=fps or None, duration_s=duration_s, drop_oldest=drop_oldest)


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[], None]]:
    """Show progress on stderr if that is a terminal; yields what to call after each answer."""
    console = Console(stderr=True)
    columns = (TextColumn("explaining"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _print(report: dict[str, Any] | str) -> None:
    typer.echo(report if isinstance(report, str) else json.dumps(report, indent=2))
