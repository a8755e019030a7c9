"""`heatlens bench`: measure a server from where its clients are."""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import cv2
import numpy as np
import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from heatlens._calls.async_client import AsyncClient
from heatlens._calls.settings import Retry
from heatlens._cli.connection import (
    DEFAULT_SERVER,
    CaOption,
    CertOption,
    ClientOptions,
    JsonOption,
    KeyOption,
    Overflow,
    ServerOption,
    TimeoutOption,
    TlsOption,
    client_options,
    fail,
    progress,
    reporting,
)
from heatlens._cli.explaining import ModelOption, VersionOption, chosen, takes
from heatlens._cli.load import (
    Call,
    Sources,
    closed_loop,
    constant_arrivals,
    open_loop,
    poisson_arrivals,
    run_streams,
)
from heatlens._cli.report import Report, Trace, as_json, as_text, summarise
from heatlens._exceptions import HeatlensError
from heatlens._results.images import ImageSource, load_image
from heatlens._results.results import Timing

_DEFAULT_CONCURRENCY = 8
_DEFAULT_DURATION_S = 10.0
# Makes calls; returns what they did, and the seconds that they took.
Loop: TypeAlias = Callable[[Call], Awaitable[tuple[Trace, float]]]
# A source is a loop in Python: beyond this it does not keep up by far.
_MAX_FPS = 1e6


class Arrivals(StrEnum):
    """How calls of an open loop are spaced."""

    POISSON = "poisson"
    CONSTANT = "constant"


@takes("method", "top_k", after="model")
def bench(
    *,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="IMAGE", show_default="a synthetic one", help="Images, sent in turn.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    model: ModelOption = None,
    model_version: VersionOption = None,
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
    print_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
    tls: TlsOption = False,
    ca: CaOption = None,
    cert: CertOption = None,
    key: KeyOption = None,
    **options: Any,  # noqa: ANN401 - the options of `takes`
) -> None:
    """Measure throughput and latency. Calls are not retried: a refusal counts as what it is.

    Latency of an open loop counts from the scheduled start. With --stream, a frame's age counts from its capture.
    Exits with 1 if nothing was explained.
    """
    # nan compares false with everything.
    if not all(value is None or 0 < value < math.inf for value in (rate, duration)):
        raise typer.BadParameter("--rate and --duration must be positive and finite")
    if stream and any(value is not None for value in (concurrency, rate, requests)):
        raise typer.BadParameter("--concurrency, --rate and --requests are of calls: not with --stream")
    if not stream and any(value is not None for value in (streams, fps, max_in_flight, overflow)):
        raise typer.BadParameter("--streams, --fps, --max-in-flight and --overflow need --stream")
    if rate is not None and concurrency is not None:
        raise typer.BadParameter("give --concurrency (closed loop) or --rate (open loop), not both")
    duration_s = _DEFAULT_DURATION_S if duration is None and requests is None else duration
    what = {"model": model, "version": model_version, **chosen(options)}
    columns = MofNCompleteColumn(), TimeElapsedColumn()
    mode: dict[str, Any]
    with reporting():
        connection = client_options(server, tls=tls, ca=ca, cert=cert, key=key, timeout=timeout)
        payloads = [load_image(path) for path in images or ()] or [synthetic_jpeg()]
        if stream:
            sources = _sources(payloads, fps, duration_s or _DEFAULT_DURATION_S, overflow)
            count = streams or 1
            full = (overflow or Overflow.BLOCK).value
            settings = what | {"max_in_flight": max_in_flight, "overflow": full, "frame_timeout": timeout}
            with progress("explaining", *columns, total=sources.total(count)) as update:
                run = _run_streams(
                    connection, what, settings, sources, count=count, on_answer=partial(update, advance=1)
                )
                report, window = asyncio.run(run)
            mode = {"loop": "open", "streams": count, "fps": fps} if fps else {"loop": "closed", "streams": count}
            mode |= {"overflow": full, "window": window}
        else:
            if rate is None:
                mode = {"loop": "closed", "concurrency": concurrency or _DEFAULT_CONCURRENCY}
                loop = partial(closed_loop, concurrency=mode["concurrency"])
            else:
                mode = {"loop": "open", "rate_per_s": rate, "arrivals": arrivals.value}
                poisson = arrivals is Arrivals.POISSON
                loop = partial(open_loop, arrivals=poisson_arrivals(rate, seed) if poisson else constant_arrivals(rate))
            with progress("explaining", *columns, total=requests) as update:
                loop = partial(loop, requests=requests, duration_s=duration_s, on_done=partial(update, advance=1))
                report = asyncio.run(_run_calls(connection, what, payloads, loop))
    typer.echo(json.dumps(as_json(mode, report), indent=2) if print_json else as_text(mode, report))
    if report.total.age is None:
        fail("no frame was explained" if stream else "no call succeeded")


async def _run_calls(
    connection: ClientOptions, what: dict[str, Any], payloads: Sequence[ImageSource], loop: Loop
) -> Report:
    """Make calls in a loop, with the images in turn; `what` are arguments of `explain`."""
    turns = itertools.cycle(payloads)
    async with _primed_client(connection, next(turns), what) as client:

        async def call() -> Timing:
            return (await client.explain(next(turns), **what)).timing

        trace, elapsed_s = await loop(call)
    return summarise([trace], elapsed_s)


async def _run_streams(
    connection: ClientOptions,
    what: dict[str, Any],
    settings: dict[str, Any],
    sources: Sources,
    *,
    count: int,
    on_answer: Callable[[], None],
) -> tuple[Report, int]:
    """Open all streams, then feed them; returns the report and the window in force.

    Args:
        connection: how to reach the server.
        what: arguments of `explain`.
        settings: arguments of `stream`.
        sources: what feeds each stream.
        count: how many streams.
        on_answer: called after each answer.

    Raises:
        HeatlensError: a stream could not be opened: fewer would not be what was asked for.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(_primed_client(connection, sources.frames[0], what))
        opened = [await stack.enter_async_context(client.stream(**settings)) for _ in range(count)]
        traces, elapsed_s = await run_streams(opened, sources, on_answer=on_answer)
        return summarise(traces, elapsed_s), min(stream.window for stream in opened)


@asynccontextmanager
async def _primed_client(
    connection: ClientOptions, payload: ImageSource, what: dict[str, Any]
) -> AsyncIterator[AsyncClient]:
    """Yield a client that does not retry, after one call that does not count.

    That call connects, and fails at once for a wrong model or a missing server.

    Raises:
        HeatlensError: it failed, and not because the server is busy.
    """
    async with AsyncClient(**connection, retry=Retry(max_attempts=1)) as client:
        try:
            await client.explain(payload, **what)
        except HeatlensError as error:
            if error.code not in {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}:
                raise
        yield client


def synthetic_jpeg() -> bytes:
    """Return a 640x480 JPEG of smooth seeded noise, about as hard to decode as a photo."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    pixels = cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def _sources(payloads: list[Any], fps: float | None, duration_s: float, overflow: Overflow | None) -> Sources:
    if not (fps is None or fps == 0 or 1 / _MAX_FPS <= fps <= _MAX_FPS):
        raise typer.BadParameter(f"--fps must be 0, or from {1 / _MAX_FPS:g} to {_MAX_FPS:g}")
    drop_oldest = overflow is Overflow.DROP_OLDEST
    if drop_oldest and not fps:
        raise typer.BadParameter("--overflow drop-oldest needs --fps: without a rate there is no end of frames to drop")
    return Sources(payloads, fps=fps or None, duration_s=duration_s, drop_oldest=drop_oldest)
