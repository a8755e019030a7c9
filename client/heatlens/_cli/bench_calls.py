"""`heatlens bench` with calls: one Explain per image."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from heatlens._calls.async_client import AsyncClient
from heatlens._calls.settings import Retry
from heatlens._cli.connection import ClientOptions
from heatlens._cli.load import (
    Latency,
    Report,
    closed_loop,
    constant_arrivals,
    open_loop,
    poisson_arrivals,
    summarise,
)
from heatlens._cli.stream_load import StreamReport
from heatlens._exceptions import HeatlensError
from heatlens._results.images import ImageSource
from heatlens._results.results import Timing


class Arrivals(StrEnum):
    """How calls of an open loop are spaced."""

    POISSON = "poisson"
    CONSTANT = "constant"


@dataclass(frozen=True, slots=True)
class CallLoad:
    """What is asked of the server.

    Attributes:
        concurrency: calls kept open, if there is no rate.
        rate_per_s: calls started per second; None for a closed loop.
        arrivals: how they are spaced.
        seed: of their spacing.
        requests: stop after so many calls.
        duration_s: stop after this time, in seconds.
    """

    concurrency: int
    rate_per_s: float | None
    arrivals: Arrivals
    seed: int
    requests: int | None
    duration_s: float | None

    def starts(self, rate_per_s: float) -> Iterator[float]:
        """Yield the start times of an open loop."""
        if self.arrivals is Arrivals.CONSTANT:
            return constant_arrivals(rate_per_s)
        return poisson_arrivals(rate_per_s, self.seed)


async def run_calls(
    options: ClientOptions,
    payloads: list[ImageSource],
    what: dict[str, Any],
    load: CallLoad,
    *,
    on_answer: Callable[[], None],
) -> Report:
    """Run the load.

    Args:
        options: how to reach the server.
        payloads: images, sent in turn.
        what: arguments of `explain`.
        load: how many and when.
        on_answer: called after each answer.
    """
    turns = itertools.cycle(payloads)
    async with AsyncClient(**options, retry=Retry(max_attempts=1)) as client:

        async def call() -> Timing:
            return (await client.explain(next(turns), **what)).timing

        await prime(client, next(turns), what)
        samples, elapsed_s = (
            await closed_loop(
                call,
                concurrency=load.concurrency,
                requests=load.requests,
                duration_s=load.duration_s,
                on_done=on_answer,
            )
            if load.rate_per_s is None
            else await open_loop(
                call,
                arrivals=load.starts(load.rate_per_s),
                requests=load.requests,
                duration_s=load.duration_s,
                on_done=on_answer,
            )
        )
    return summarise(samples, elapsed_s)


async def prime(client: AsyncClient, payload: ImageSource, what: dict[str, Any]) -> None:
    """Make one call that does not count: it connects, and tells of a wrong model or a missing server at once.

    Raises:
        HeatlensError: it failed, and not because the server is busy.
    """
    try:
        await client.explain(payload, **what)
    except HeatlensError as error:
        if error.code not in {"RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}:
            raise


def calls_as_json(load: CallLoad, report: Report) -> dict[str, Any]:
    """Return the report with what it is of."""
    mode: dict[str, Any] = (
        {"loop": "closed", "concurrency": load.concurrency}
        if load.rate_per_s is None
        else {"loop": "open", "rate_per_s": load.rate_per_s, "arrivals": load.arrivals.value}
    )
    return mode | asdict(report)


def calls_as_text(load: CallLoad, report: Report) -> str:
    """Return the report as lines."""
    head = (
        f"closed loop, {load.concurrency} in flight"
        if load.rate_per_s is None
        else f"open loop, {load.rate_per_s:g}/s {load.arrivals}"
    )
    lines = [
        f"{head}: {report.requests} calls in {report.elapsed_s:.2f} s",
        f"  throughput   {report.throughput_per_s:.1f}/s",
        f"  codes        {', '.join(f'{code} {count}' for code, count in report.codes.items())}",
    ]
    if report.latency is not None:
        lines.append(f"  latency ms   {latency_text(report.latency)}")
    return "\n".join([*lines, *server_lines(report)])


def latency_text(latency: Latency) -> str:
    """Return latencies in one line."""
    return (
        f"mean {latency.mean_ms:.1f}, p50 {latency.p50_ms:.1f}, p90 {latency.p90_ms:.1f}, "
        f"p95 {latency.p95_ms:.1f}, p99 {latency.p99_ms:.1f}, max {latency.max_ms:.1f}"
    )


def server_lines(report: Report | StreamReport) -> list[str]:
    """Return where the server's time went, and how late this client was."""
    lines: list[str] = []
    if report.mean_queue_ms is not None:
        lines.append(
            f"  server ms    queue {report.mean_queue_ms:.1f}, preprocess {report.mean_preprocess_ms:.1f}, "
            f"compute {report.mean_compute_ms:.1f}"
        )
    if report.mean_batch_size is not None:
        lines.append(f"  batch size   {report.mean_batch_size:.2f}")
    return [*lines, f"  start lag    {report.p99_lag_ms:.1f} ms p99"]
