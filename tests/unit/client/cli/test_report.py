"""Statistics of calls and streams, as JSON and as text."""

import pytest

from heatlens import Timing, UnavailableError
from heatlens._cli.report import Sample, Trace, as_json, as_text, summarise

TIMING = Timing(queue_ms=1.0, preprocess_ms=2.0, compute_ms=3.0, batch_size=4)
ANSWERED = [Sample(ms / 1e3, "OK", TIMING) for ms in range(1, 101)]
AGE = {"mean_ms": 50.5, "p50_ms": 50.5, "p90_ms": 90.1, "p95_ms": 95.05, "p99_ms": 99.01, "max_ms": 100.0}
CLOSED = {"loop": "closed", "concurrency": 8}
OPEN = {"loop": "open", "rate_per_s": 12.5, "arrivals": "poisson"}
STREAMS = {"loop": "open", "streams": 2, "fps": 10.0, "overflow": "drop-oldest", "window": 4}
ONE_STREAM = {"loop": "closed", "streams": 1, "overflow": "block", "window": 8}


@pytest.fixture
def calls():
    """A hundred calls that took 1 to 100 ms, and a refused one."""
    refused = Sample(9.0, "RESOURCE_EXHAUSTED", None)
    lags_s = [0.0] * 100 + [0.5]
    return summarise([Trace(captured=101, sent=101, samples=[*ANSWERED, refused], lags_s=lags_s)], 2.0)


@pytest.fixture
def streams():
    """One stream that was answered well and lost a frame, and one that broke."""
    one = Trace(captured=103, sent=101, lags_s=[0.0] * 99 + [0.2])
    one.samples = [*ANSWERED, Sample(9.0, "DROPPED", None)]
    other = Trace(captured=4, sent=3, samples=[Sample(0.05, "SKIPPED", None)], error=UnavailableError("gone"))
    return summarise([one, other], 2.0)


def test_calls_as_json(calls):
    report = as_json(CLOSED, calls)
    assert report.pop("latency") == pytest.approx(AGE)
    assert report.pop("mean_batch_size") == pytest.approx(4.0)
    assert report == {
        **CLOSED,
        "requests": 101,
        "elapsed_s": 2.0,
        "throughput_per_s": 50.0,
        "codes": {"OK": 100, "RESOURCE_EXHAUSTED": 1},
        "mean_queue_ms": 1.0,
        "mean_preprocess_ms": 2.0,
        "mean_compute_ms": 3.0,
        "p99_lag_ms": 0.0,
    }
    assert list(as_json(OPEN, calls))[:4] == ["loop", "rate_per_s", "arrivals", "requests"]


def test_calls_as_text(calls):
    assert as_text(CLOSED, calls).splitlines() == [
        "closed loop, 8 in flight: 101 calls in 2.00 s",
        "  throughput   50.0/s",
        "  codes        OK 100, RESOURCE_EXHAUSTED 1",
        "  latency ms   mean 50.5, p50 50.5, p90 90.1, p95 95.0, p99 99.0, max 100.0",
        "  server ms    queue 1.0, preprocess 2.0, compute 3.0",
        "  batch size   4.00",
        "  start lag    0.0 ms p99",
    ]
    assert as_text(OPEN, calls).startswith("open loop, 12.5/s poisson: 101 calls in 2.00 s\n")


def test_streams_as_json(streams):
    report = as_json(STREAMS, streams)
    total, (one, other) = report.pop("total"), report.pop("per_stream")
    # Of explained frames only: dropped ones are counted, not averaged.
    assert total.pop("age") == pytest.approx(AGE)
    assert total == {
        "captured": 107,
        "explained": 100,
        "explained_per_s": 50.0,
        "dropped": 1,
        "skipped": 1,
        # Sent on the broken stream and never answered.
        "failed": {"UNAVAILABLE": 2},
        "unsent": 3,
    }
    assert (one["explained_per_s"], one["failed"], one["unsent"]) == (50.0, {}, 2)
    assert (other["explained_per_s"], other["failed"], other["unsent"], other["age"]) == (
        0,
        {"UNAVAILABLE": 2},
        1,
        None,
    )
    assert report.pop("mean_batch_size") == pytest.approx(4.0)
    assert report.pop("p99_lag_ms") == pytest.approx(2.0)
    assert report == {
        **STREAMS,
        "elapsed_s": 2.0,
        "broken": {"UNAVAILABLE": 1},
        "mean_queue_ms": 1.0,
        "mean_preprocess_ms": 2.0,
        "mean_compute_ms": 3.0,
    }


def test_streams_as_text(streams):
    assert as_text(STREAMS, streams).splitlines() == [
        "2 streams, 10 frames/s each, drop-oldest, window 4: 107 frames in 2.00 s",
        "  explained    100, 50.0/s",
        "  others       dropped 1, skipped 1, unsent 3, failed 2 (UNAVAILABLE 2)",
        "  broken       UNAVAILABLE 1 (streams)",
        "  age ms       mean 50.5, p50 50.5, p90 90.1, p95 95.0, p99 99.0, max 100.0",
        "  server ms    queue 1.0, preprocess 2.0, compute 3.0",
        "  batch size   4.00",
        "  start lag    2.0 ms p99",
        "  stream  explained      /s  age p50 ms  p95 ms  p99 ms  others",
        "       0        100    50.0        50.5    95.0    99.0  dropped 1, unsent 2",
        "       1          0     0.0           -       -       -  skipped 1, unsent 1, failed 2 (UNAVAILABLE 2)",
    ]


def test_batch_size_is_per_batch_not_per_image():
    sizes = [8] * 8 + [2] * 2
    timings = [Timing(queue_ms=0, preprocess_ms=0, compute_ms=0, batch_size=size) for size in sizes]
    trace = Trace(samples=[Sample(0.1, "OK", timing) for timing in timings])
    assert summarise([trace], 1.0).mean_batch_size == pytest.approx(5.0)


def test_nothing_is_no_division_by_zero():
    report = summarise([Trace()], 0.0)
    assert (report.total.captured, report.total.explained_per_s, report.total.age) == (0, 0.0, None)
    assert (report.mean_batch_size, report.p99_lag_ms) == (None, 0.0)
    assert as_json(CLOSED, report)["codes"] == {}
    assert as_text(ONE_STREAM, report).splitlines() == [
        "1 stream, as fast as the window allows, block, window 8: 0 frames in 0.00 s",
        "  explained    0, 0.0/s",
        "  others       none",
        "  start lag    0.0 ms p99",
    ]
