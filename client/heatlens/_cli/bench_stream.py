"""`heatlens bench --stream`: videos played at the server."""

from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

from heatlens._calls.async_client import AsyncClient
from heatlens._calls.settings import Retry
from heatlens._cli.bench_calls import latency_text, prime, server_lines
from heatlens._cli.connection import ClientOptions
from heatlens._cli.stream_load import Sources, StreamReport, StreamShare, run_streams, summarise_streams
from heatlens._wire.streams import OverflowName


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """What is asked of the server.

    Attributes:
        streams: how many are open.
        sources: what feeds each.
        max_in_flight: the window asked for; None: the server's choice.
        frame_timeout_s: how long a frame may wait in the server, in seconds.
    """

    streams: int
    sources: Sources
    max_in_flight: int | None
    frame_timeout_s: float

    @property
    def overflow(self) -> OverflowName:
        """What happens when there are too many frames."""
        return "drop-oldest" if self.sources.drop_oldest else "block"

    @property
    def captures(self) -> int | None:
        """How many frames are captured in all; None if that depends on the server."""
        if self.sources.fps is None:
            return None
        return sum(self.sources.captures(source, self.streams) for source in range(self.streams))


async def run_stream_load(
    options: ClientOptions, what: dict[str, Any], load: StreamLoad, *, on_answer: Callable[[], None]
) -> tuple[StreamReport, int]:
    """Open all streams, then run the load.

    Args:
        options: how to reach the server.
        what: arguments of `explain` and `stream`.
        load: how many and when.
        on_answer: called after each answer.

    Returns:
        What was measured, and the window in force.

    Raises:
        HeatlensError: a stream could not be opened: fewer would not be what was asked for.
    """
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(**options, retry=Retry(max_attempts=1)))
        await prime(client, load.sources.frames[0], what)
        streams = [
            await stack.enter_async_context(
                client.stream(
                    **what,
                    max_in_flight=load.max_in_flight,
                    overflow=load.overflow,
                    frame_timeout=load.frame_timeout_s,
                )
            )
            for _ in range(load.streams)
        ]
        traces, elapsed_s = await run_streams(streams, load.sources, on_answer=on_answer)
        return summarise_streams(traces, elapsed_s), min(stream.window for stream in streams)


def streams_as_json(load: StreamLoad, report: StreamReport, window: int) -> dict[str, Any]:
    """Return the report with what it is of."""
    fps = load.sources.fps
    mode: dict[str, Any] = {"loop": "closed" if fps is None else "open", "streams": load.streams}
    if fps is not None:
        mode["fps"] = fps
    return mode | {"overflow": load.overflow, "window": window} | asdict(report)


def streams_as_text(load: StreamLoad, report: StreamReport, window: int) -> str:
    """Return the report as lines."""
    total, fps = report.total, load.sources.fps
    rate = "as fast as the window allows" if fps is None else f"{fps:g} frames/s each"
    streams = f"{load.streams} stream{'s' if load.streams > 1 else ''}"
    lines = [
        f"{streams}, {rate}, {load.overflow}, window {window}: {total.captured} frames in {report.elapsed_s:.2f} s",
        f"  explained    {total.explained}, {total.explained_per_s:.1f}/s",
        f"  others       {_others(total)}",
    ]
    if report.broken:
        lines.append(f"  broken       {_codes(report.broken)} (streams)")
    if total.age is not None:
        lines.append(f"  age ms       {latency_text(total.age)}")
    lines += server_lines(report)
    if load.streams > 1:
        lines += _per_stream(report.per_stream)
    return "\n".join(lines)


def _others(share: StreamShare) -> str:
    parts = [
        f"{name} {count}"
        for name, count in (("dropped", share.dropped), ("skipped", share.skipped), ("unsent", share.unsent))
        if count
    ]
    if share.failed:
        parts.append(f"failed {sum(share.failed.values())} ({_codes(share.failed)})")
    return ", ".join(parts) or "none"


def _codes(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items())


def _per_stream(shares: Sequence[StreamShare]) -> list[str]:
    lines = ["  stream  explained      /s  age p50 ms  p95 ms  p99 ms  others"]
    for index, share in enumerate(shares):
        ages = ("-", "-", "-")
        if share.age is not None:
            ages = (f"{share.age.p50_ms:.1f}", f"{share.age.p95_ms:.1f}", f"{share.age.p99_ms:.1f}")
        lines.append(
            f"  {index:>6}  {share.explained:>9}  {share.explained_per_s:>6.1f}  {ages[0]:>10}  {ages[1]:>6}  "
            f"{ages[2]:>6}  {_others(share)}"
        )
    return lines
