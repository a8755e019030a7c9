"""What a run of `heatlens bench` showed, by calls or by streams: its statistics, as JSON and as text."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from heatlens._exceptions import HeatlensError
from heatlens._results.results import Timing

EXPLAINED, DROPPED, SKIPPED = "OK", "DROPPED", "SKIPPED"


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to a call or frame.

    Attributes:
        latency_s: from the scheduled start of the call, or the capture of the frame, to the answer, in seconds.
        code: "OK", "DROPPED", "SKIPPED" or the status code's name.
        timing: the server's timing; None if nothing was explained.
    """

    latency_s: float
    code: str
    timing: Timing | None


@dataclass(slots=True)
class Trace:
    """What one stream did, or all calls together.

    Attributes:
        captured: frames captured, or calls made.
        sent: those that were sent.
        samples: the answers, in order.
        lags_s: for each frame or call due, how late this client itself was, in seconds: waiting for a full window is
            not counted.
        error: what broke the stream; None if nothing did.
    """

    captured: int = 0
    sent: int = 0
    samples: list[Sample] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    error: HeatlensError | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Latencies in milliseconds. Percentiles are interpolated linearly (numpy's default)."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_ms')} {value:.1f}" for name, value in asdict(self).items())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of calls or frames: one stream's, or all.

    `captured` is the sum of the numbers after it, but for `explained_per_s`.

    Attributes:
        captured: frames captured in the time of the run, or calls made.
        explained: those answered with a result.
        explained_per_s: the same per second of the whole run.
        dropped: frames that gave way to newer ones.
        skipped: frames that the server left out as it was asked to.
        failed: those that failed, by status code; frames that a broken stream left unanswered have its code.
        unsent: frames not sent: they still waited here when the time was over, or the stream had broken.
        age: the latencies of those explained; None if none was.
    """

    captured: int
    explained: int
    explained_per_s: float
    dropped: int
    skipped: int
    failed: dict[str, int]
    unsent: int
    age: Latency | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run showed.

    Attributes:
        elapsed_s: from the first scheduled start or capture to the last answer.
        total: all calls, or all streams together.
        per_stream: each stream; of calls, one for all.
        broken: what broke a stream, by status code.
        mean_batch_size: images per batch run, not per image: a batch of 8 and one of 2 make 5.
        mean_queue_ms: mean time in the server's queue.
        mean_preprocess_ms: mean time to decode and resize.
        mean_compute_ms: mean time of the batches that held the images.
        p99_lag_ms: how late this client itself was; large means that the client, not the server, was measured.
    """

    elapsed_s: float
    total: Outcome
    per_stream: tuple[Outcome, ...]
    broken: dict[str, int]
    mean_batch_size: float | None
    mean_queue_ms: float | None
    mean_preprocess_ms: float | None
    mean_compute_ms: float | None
    p99_lag_ms: float


def summarise(traces: Sequence[Trace], elapsed_s: float) -> Report:
    """Return the statistics of a run."""
    timings = [sample.timing for trace in traces for sample in trace.samples if sample.timing is not None]
    lags_s = [lag_s for trace in traces for lag_s in trace.lags_s]
    return Report(
        elapsed_s=elapsed_s,
        total=_outcome(traces, elapsed_s),
        per_stream=tuple(_outcome([trace], elapsed_s) for trace in traces),
        broken=_by_code(trace.error.code.value for trace in traces if trace.error is not None),
        mean_batch_size=batch_size_of(timings),
        mean_queue_ms=_mean([timing.queue_ms for timing in timings]),
        mean_preprocess_ms=_mean([timing.preprocess_ms for timing in timings]),
        mean_compute_ms=_mean([timing.compute_ms for timing in timings]),
        p99_lag_ms=float(np.percentile(lags_s, 99)) * 1e3 if lags_s else 0.0,
    )


def batch_size_of(timings: Sequence[Timing]) -> float | None:
    """Return the mean size of the batches that ran, not of the batches that images were in; None without any."""
    # An image in a batch of n stands for 1/n of a batch.
    shares = [1 / timing.batch_size for timing in timings if timing.batch_size > 0]
    return len(shares) / sum(shares) if shares else None


def _outcome(traces: Sequence[Trace], elapsed_s: float) -> Outcome:
    samples = [sample for trace in traces for sample in trace.samples]
    codes = [sample.code for sample in samples]
    for trace in traces:
        # A stream that did not break answers all.
        if trace.error is not None:
            codes += [trace.error.code.value] * (trace.sent - len(trace.samples))
    explained_s = [sample.latency_s for sample in samples if sample.code == EXPLAINED]
    return Outcome(
        captured=sum(trace.captured for trace in traces),
        explained=len(explained_s),
        explained_per_s=len(explained_s) / elapsed_s if elapsed_s > 0 else 0.0,
        dropped=codes.count(DROPPED),
        skipped=codes.count(SKIPPED),
        failed=_by_code(code for code in codes if code not in {EXPLAINED, DROPPED, SKIPPED}),
        unsent=sum(trace.captured - trace.sent for trace in traces),
        age=_latency(explained_s),
    )


def _by_code(codes: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(codes).items()))


def _latency(latencies_s: Sequence[float]) -> Latency | None:
    if not latencies_s:
        return None
    ms = np.array(latencies_s) * 1e3
    p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, [50, 90, 95, 99]))
    return Latency(mean_ms=float(ms.mean()), p50_ms=p50, p90_ms=p90, p95_ms=p95, p99_ms=p99, max_ms=float(ms.max()))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def as_json(mode: dict[str, Any], report: Report) -> dict[str, Any]:
    """Return a report with what it is of.

    Args:
        mode: of calls, `loop`, and `concurrency` or `rate_per_s` and `arrivals`; of streams, `loop`, `streams`, `fps`
            in an open loop, `overflow` and `window`.
        report: what was measured.
    """
    found = asdict(report)
    if "streams" in mode:
        return mode | found
    total = found["total"]
    calls = {
        "requests": total["captured"],
        "elapsed_s": report.elapsed_s,
        "throughput_per_s": total["explained_per_s"],
        "codes": _codes_of_calls(report.total),
        "latency": total["age"],
    }
    return mode | calls | {name: found[name] for name in found if name not in {"total", "per_stream", "broken"}}


def as_text(mode: dict[str, Any], report: Report) -> str:
    """Return a report as lines, with a table if there are several streams; arguments as for JSON."""
    total = report.total
    rows: dict[str, object]
    if "streams" in mode:
        streams = f"{mode['streams']} stream{'s' if mode['streams'] > 1 else ''}"
        rate = f"{mode['fps']:g} frames/s each" if "fps" in mode else "as fast as the window allows"
        head = f"{streams}, {rate}, {mode['overflow']}, window {mode['window']}: {total.captured} frames"
        rows = {
            "explained": f"{total.explained}, {total.explained_per_s:.1f}/s",
            "others": _others(total),
            "broken": f"{_codes_as_text(report.broken)} (streams)" if report.broken else None,
            "age ms": total.age,
        }
    else:
        closed = f"closed loop, {mode.get('concurrency')} in flight"
        head = closed if mode["loop"] == "closed" else f"open loop, {mode['rate_per_s']:g}/s {mode['arrivals']}"
        head += f": {total.captured} calls"
        rows = {
            "throughput": f"{total.explained_per_s:.1f}/s",
            "codes": _codes_as_text(_codes_of_calls(total)),
            "latency ms": total.age,
        }
    if report.mean_queue_ms is not None:
        rows["server ms"] = (
            f"queue {report.mean_queue_ms:.1f}, preprocess {report.mean_preprocess_ms:.1f}, "
            f"compute {report.mean_compute_ms:.1f}"
        )
    if report.mean_batch_size is not None:
        rows["batch size"] = f"{report.mean_batch_size:.2f}"
    rows["start lag"] = f"{report.p99_lag_ms:.1f} ms p99"
    lines = [f"  {name:<12} {value}" for name, value in rows.items() if value is not None]
    table = _table(report.per_stream) if len(report.per_stream) > 1 else []
    return "\n".join([f"{head} in {report.elapsed_s:.2f} s", *lines, *table])


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    lines = ["  stream  explained      /s  age p50 ms  p95 ms  p99 ms  others"]
    for index, outcome in enumerate(outcomes):
        age = outcome.age
        p50, p95, p99 = ("-",) * 3 if age is None else (f"{ms:.1f}" for ms in (age.p50_ms, age.p95_ms, age.p99_ms))
        lines.append(
            f"  {index:>6}  {outcome.explained:>9}  {outcome.explained_per_s:>6.1f}  {p50:>10}  {p95:>6}  {p99:>6}  "
            f"{_others(outcome)}"
        )
    return lines


def _others(outcome: Outcome) -> str:
    counts = {"dropped": outcome.dropped, "skipped": outcome.skipped, "unsent": outcome.unsent}
    parts = [f"{name} {count}" for name, count in counts.items() if count]
    if outcome.failed:
        parts.append(f"failed {sum(outcome.failed.values())} ({_codes_as_text(outcome.failed)})")
    return ", ".join(parts) or "none"


def _codes_of_calls(total: Outcome) -> dict[str, int]:
    return dict(sorted({**total.failed, **({EXPLAINED: total.explained} if total.explained else {})}.items()))


def _codes_as_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{code} {count}" for code, count in counts.items())
