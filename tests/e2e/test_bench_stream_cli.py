"""`heatlens bench --stream` against a real server."""

import json

import pytest

pytestmark = pytest.mark.serial


@pytest.fixture
def bench(run, server):
    """Run `heatlens bench --stream` in this process; stdout and stderr apart."""

    def bench(*arguments, stream=True, address=server.address, **options):
        return run("bench", "--server", address, *(["--stream"] if stream else []), *arguments, **options)

    return bench


def test_open_loop(bench, chelsea_path):
    done = bench(chelsea_path, "--streams", 3, "--fps", 20, "--duration", 0.5, "--max-in-flight", 4, "--json")
    report = json.loads(done.stdout)
    mode = {name: report[name] for name in ("loop", "streams", "fps", "overflow", "window")}
    assert mode == {"loop": "open", "streams": 3, "fps": 20, "overflow": "block", "window": 4}
    total = report["total"]
    assert (total["captured"], total["failed"], total["skipped"]) == (30, {}, 0)
    assert total["explained"] + total["unsent"] == 30
    assert total["explained"] == sum(share["explained"] for share in report["per_stream"])
    assert 0 < total["age"]["p50_ms"] <= total["age"]["p95_ms"] <= total["age"]["p99_ms"]
    assert report["mean_batch_size"] >= 1
    # No progress bar: stderr is not a terminal.
    assert done.stderr == ""


def test_closed_loop_as_text(bench):
    text = bench("--duration", 0.3, "--streams", 2).stdout
    for word in ("2 streams, as fast as the window allows, block, window", "explained", "age ms", "p99", "batch size"):
        assert word in text
    # The table: one line for each stream.
    assert [line.split()[0] for line in text.splitlines()[-3:]] == ["stream", "0", "1"]


def test_a_server_too_slow_drops_and_tells(bench):
    # No server explains 2000 photos per second and stream.
    arguments = ("--fps", 2000, "--duration", 0.5, "--max-in-flight", 2, "--json")
    dropping = json.loads(bench(*arguments, "--overflow", "drop-oldest").stdout)["total"]
    blocking = json.loads(bench(*arguments, "--overflow", "block").stdout)["total"]
    assert dropping["dropped"] > 0
    assert blocking["dropped"] == 0
    assert blocking["unsent"] > 0
    for total in (dropping, blocking):
        assert total["captured"] == 1000
        assert total["explained"] + total["dropped"] + total["unsent"] == 1000


def test_a_bad_frame_is_counted_by_code(bench, chelsea_path, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"garbage")
    report = json.loads(bench(chelsea_path, bad, "--fps", 20, "--duration", 0.5, "--json").stdout)
    assert report["total"]["failed"] == {"INVALID_ARGUMENT": 5}
    assert report["broken"] == {}


def test_errors(bench):
    for arguments in (("--model", "nope"), ("--max-in-flight", 0.5), ("--concurrency", 2), ("--rate", 5)):
        assert "Traceback" not in bench(*arguments, exit_code=1 if "--model" in arguments else 2).output
    assert "STREAM_LIMIT" in bench("--streams", 1000, "--duration", 0.1, exit_code=1).stderr
    for fps in (-1, "nan", "inf", 1e9):
        bench("--fps", fps, exit_code=2)
    bench("--overflow", "drop-oldest", exit_code=2)
    bench("--requests", 5, exit_code=2)
    for arguments in (("--streams", 2), ("--fps", 5), ("--max-in-flight", 1), ("--overflow", "block")):
        bench(*arguments, stream=False, exit_code=2)
    assert bench(address="127.0.0.1:1", exit_code=1).stderr.startswith("heatlens: error: ")
