"""`heatlens top`: what a server does at the moment, from its /metrics."""

import time
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from heatlens._cli.connection import fail, reporting
from heatlens._cli.interrupt import INTERRUPTED
from heatlens._cli.scrape import Between, metrics_url, scrape

_OUTCOMES = ("explained", "dropped", "skipped", "failed")
_SHORTEST_S, _TIMEOUT_S = 0.1, 5.0
_WIDTH = 200


def top(
    *,
    metrics: Annotated[
        str,
        typer.Option(
            "--metrics", "-m", envvar="HEATLENS_METRICS", metavar="HOST:PORT|URL", help="What [metrics] listen has."
        ),
    ] = "localhost:9090",
    interval: Annotated[
        float, typer.Option("--interval", "-i", metavar="SECONDS", min=_SHORTEST_S, help="From one look to the next.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one interval and end.")] = False,
) -> None:
    """Watch a server: its models, queues, rates, latencies and streams, each over the last interval.

    The server needs [metrics] listen. Ctrl-C ends it. Where standard output is no terminal, one interval is shown.
    """
    try:
        url = metrics_url(metrics)
    except ValueError as error:
        fail(str(error), exit_code=2)
    console = Console()
    if not console.is_terminal:
        # Nothing is cut where nobody looks.
        console.width = _WIDTH
    with reporting(exit_code=2):
        before = scrape(url, timeout_s=_TIMEOUT_S)
        try:
            if once or not console.is_terminal:
                time.sleep(interval)
                console.print(view(Between(before, scrape(url, timeout_s=_TIMEOUT_S)), url))
                return
            with Live(Text(f"{url}: the first interval"), console=console, screen=True, auto_refresh=False) as live:
                while True:
                    time.sleep(interval)
                    try:
                        after = scrape(url, timeout_s=_TIMEOUT_S)
                    except ConnectionError as error:
                        # It may be on its way back.
                        live.update(Text(str(error), style="red"), refresh=True)
                        continue
                    live.update(view(Between(before, after), url), refresh=True)
                    before = after
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


def view(seen: Between, url: str) -> RenderableType:
    """Return what is shown: a line on the server, then its models, calls and streams."""
    parts: list[RenderableType] = [Text(_summary(seen, url)), Text(), _models(seen)]
    if seen.after.values("heatlens_calls_total", "rpc"):
        parts += [Text(), _calls(seen)]
    if seen.after.values("heatlens_frames_total", "model"):
        parts += [Text(), _streams(seen)]
    return Group(*parts)


def _summary(seen: Between, url: str) -> str:
    now = seen.after
    (version, *_) = now.values("heatlens_build_info", "version")
    parts = [
        f"heatlens {version}",
        url,
        f"calls in flight {now.total('heatlens_calls_in_flight'):.0f}",
        f"open streams {now.total('heatlens_open_streams'):.0f}",
        f"bytes in flight {_mebibytes(now.total('heatlens_in_flight_bytes'))}",
    ]
    # Only Linux has these.
    if "process_resident_memory_bytes" in now.samples:
        parts.append(f"memory {_mebibytes(now.total('process_resident_memory_bytes'))}")
        parts.append(f"CPU {100 * seen.rate('process_cpu_seconds_total'):.0f} %")
    return "   ".join(parts)


def _models(seen: Between) -> Table:
    columns = (
        "STATE",
        "ENGINE",
        "DEVICES",
        "QUEUE",
        "IMAGES/s",
        "FAILED/s",
        "BATCH",
        "WAIT p50 p99 ms",
        "COMPUTE p50 p99 ms",
        "BUSY",
    )
    table = _table("MODEL", *columns)
    for model in seen.after.values("heatlens_model_state", "model"):
        # How many versions are in each.
        states = [
            has["state"] if value == 1 else f"{value:.0f} {has['state']}"
            for has, value in seen.after.select("heatlens_model_state", model=model)
            if value
        ]
        engines = [
            f"{has['engine']} {has['device']} {has['precision']}"
            for has, _ in seen.after.select("heatlens_model_info", model=model)
        ]
        batch = seen.mean("heatlens_batch_size_images", model=model)
        devices = seen.after.values("heatlens_device_busy_seconds_total", "device", model=model)
        busy = seen.rate("heatlens_device_busy_seconds_total", model=model) / max(1, len(devices))
        table.add_row(
            model,
            ", ".join(states),
            ", ".join(engines) or "-",
            _devices(seen, model),
            f"{seen.after.total('heatlens_queue_length', model=model):.0f}",
            f"{seen.rate('heatlens_images_explained_total', model=model):.1f}",
            f"{seen.rate('heatlens_images_failed_total', model=model):.1f}",
            "-" if batch is None else f"{batch:.1f}",
            _p50_p99_ms(seen, "heatlens_queue_duration_seconds", model=model),
            _p50_p99_ms(seen, "heatlens_compute_duration_seconds", model=model),
            f"{100 * busy:.0f} %",
        )
    return table


def _devices(seen: Between, model: str) -> str:
    """Return how many devices a model has, or "1 of 2" where one is taken out."""
    serves = [value for _, value in seen.after.select("heatlens_device_in_service", model=model)]
    working, all_of_them = round(sum(serves)), len(serves)
    return f"{working} of {all_of_them}" if working < all_of_them else str(all_of_them or "-")


def _calls(seen: Between) -> Table:
    table = _table("CALL", "MODEL", "CALLS/s", "p50 p99 ms", "CODES/s")
    pairs = dict.fromkeys((has["rpc"], has["model"]) for has, _ in seen.after.select("heatlens_calls_total"))
    for rpc, model in sorted(pairs):
        rates = {
            code: seen.rate("heatlens_calls_total", rpc=rpc, model=model, code=code)
            for code in sorted(seen.after.values("heatlens_calls_total", "code", rpc=rpc, model=model))
        }
        table.add_row(
            rpc,
            model or "-",
            f"{sum(rates.values()):.1f}",
            _p50_p99_ms(seen, "heatlens_call_duration_seconds", rpc=rpc, model=model),
            _rates(rates.items()),
        )
    return table


def _streams(seen: Between) -> Table:
    table = _table("FRAMES OF", *(f"{outcome.upper()}/s" for outcome in _OUTCOMES), "AGE p50 p99 ms")
    for model in seen.after.values("heatlens_frames_total", "model"):
        rates = [seen.rate("heatlens_frames_total", model=model, outcome=outcome) for outcome in _OUTCOMES]
        age = _p50_p99_ms(seen, "heatlens_frame_age_seconds", model=model)
        table.add_row(model, *(f"{rate:.1f}" for rate in rates), age)
    return table


def _table(first: str, *columns: str) -> Table:
    table = Table(first, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in {"STATE", "ENGINE", "MODEL", "CODES/s"} else "right")
    return table


def _p50_p99_ms(seen: Between, name: str, **labels: str) -> str:
    p50, p99 = (seen.quantile(share, name, **labels) for share in (0.5, 0.99))
    return "-" if p50 is None or p99 is None else f"{1e3 * p50:.1f} {1e3 * p99:.1f}"


def _rates(rates: Iterable[tuple[str, float]]) -> str:
    """Return "OK 12.0, NOT_FOUND 0.5", without what did not happen."""
    return ", ".join(f"{code} {rate:.1f}" for code, rate in rates if rate) or "-"


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f} MiB"
