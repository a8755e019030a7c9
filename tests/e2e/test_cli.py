"""The real `heatlens` command against a real server: output, files and exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import heatlens
from video_files import one_line

COMMAND = Path(sys.executable).parent / "heatlens"
NOBODY = "127.0.0.1:1"


@pytest.fixture
def run_on(run, server):
    """The same, told about the server."""
    return lambda command, *arguments, **options: run(command, "--server", server.address, *arguments, **options)


def test_version_of_the_installed_command():
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"heatlens {heatlens.__version__}\n"
    assert done.stderr == ""


def test_no_arguments_is_help():
    done = subprocess.run([COMMAND], capture_output=True, text=True, check=False)
    assert "explain" in done.stdout + done.stderr


def test_cli_loads_no_torch():
    program = "import sys, heatlens._cli.commands; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_explain(run_on, chelsea_path):
    done = run_on("explain", chelsea_path, "--top-k", 2)
    assert done.stdout.splitlines()[0] == f"{chelsea_path}: tiny"
    assert len(done.stdout.splitlines()) == 3
    assert done.stderr == ""


def test_explain_json_and_files(run_on, chelsea_path, chelsea, tmp_path):
    out = tmp_path / "new" / "folder"
    done = run_on("explain", chelsea_path, "--class", 3, "--class", 1, "-o", out, "--json", "--method", "grad-cam")
    answer = json.loads(one_line(done.stdout))
    assert answer["model"] == "tiny"
    assert answer["source_size"] == [451, 300]
    assert [item["class_id"] for item in answer["explanations"]] == [3, 1]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["chelsea-1.npy", "chelsea-1.png", "chelsea-3.npy", "chelsea-3.png"]
    )
    for item in answer["explanations"]:
        assert cv2.imread(item["overlay"]).shape == chelsea.shape
        assert np.load(item["map"]).shape == (item["map_height"], item["map_width"])


def test_explain_by_label(run_on, chelsea_path):
    options = "--model", "efficientnet_lite0", "--json"
    done = run_on("explain", chelsea_path, *options, "--class", "tabby", "--class", 285)
    found = json.loads(one_line(done.stdout))["explanations"]
    assert [(item["class_id"], item["label"]) for item in found] == [(285, "Egyptian cat"), (281, "tabby")]
    done = run_on("explain", chelsea_path, *options, "--class", "unicorn", exit_code=1)
    assert "unicorn" in one_line(done.stderr)


def test_explain_goes_on_after_a_bad_file(run_on, chelsea_path, tmp_path):
    bad, missing = tmp_path / "bad.jpg", tmp_path / "missing.jpg"
    bad.write_bytes(b"garbage")
    done = run_on("explain", bad, missing, chelsea_path, "--json", exit_code=1)
    assert json.loads(one_line(done.stdout))["path"] == str(chelsea_path)
    first, second = done.stderr.splitlines()
    assert str(bad) in first
    assert "IMAGE_UNDECODABLE" in first
    assert str(missing) in second


def test_explain_keeps_the_order_of_many_files(run_on, chelsea_path, tmp_path):
    paths = [tmp_path / f"{index}.png" for index in range(20)]
    for path in paths:
        path.write_bytes(chelsea_path.read_bytes())
    done = run_on("explain", *paths, "--json")
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == [str(path) for path in paths]


def test_explain_refuses_to_overwrite_its_own_files(run_on, chelsea_path, tmp_path):
    other = tmp_path / "chelsea.jpg"
    other.write_bytes(b"x")
    done = run_on("explain", chelsea_path, other, "-o", tmp_path / "out", exit_code=1)
    assert "same files" in one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "nope"], "MODEL_NOT_FOUND"),
        (["--method", "nope"], "method: expected one of cam, grad-cam"),
        (["--layer", "nope"], "unknown layer"),
        (["--top-k", "3", "--class", "1"], "class_ids: cannot be combined with top_k"),
        (["--timeout", "-1"], "timeout"),
    ],
)
def test_explain_errors_are_one_line(run_on, chelsea_path, arguments, words):
    done = run_on("explain", chelsea_path, *arguments, exit_code=1)
    assert done.stdout == ""
    assert words in one_line(done.stderr)


def test_nobody_there(run, chelsea_path):
    done = run("models", "--server", NOBODY, "--timeout", 5, exit_code=1)
    assert "[UNAVAILABLE" in one_line(done.stderr)
    assert done.stdout == ""


def test_server_from_the_environment(run, server, monkeypatch):
    monkeypatch.setenv("HEATLENS_ADDRESS", server.address)
    assert "tiny" in run("models").stdout


def test_token_from_the_environment_stays_home(run, monkeypatch):
    monkeypatch.setenv("HEATLENS_TOKEN", "two words")
    done = run("models", "--server", NOBODY, exit_code=1)
    assert "token" in one_line(done.stderr)
    assert "two words" not in done.output


def test_missing_ca_file(run, tmp_path):
    done = run("models", "--server", NOBODY, "--ca", tmp_path / "ca.pem", exit_code=1)
    assert one_line(done.stderr) == f"heatlens: error: {tmp_path / 'ca.pem'}: No such file or directory"


def test_models(run_on):
    lines = run_on("models").stdout.splitlines()
    assert lines[0].split() == ["NAME", "VERSION", "STATE", "TASK", "INPUT", "CLASSES", "ENGINE", "DEVICE", "METHODS"]
    assert re.match(r"tiny\*\s+\w+\s+ready\s+classification\s+64x64\s+10\s", lines[1])
    assert any(line.startswith("broken") and "failed" in line for line in lines)
    models = json.loads(run_on("models", "--json").stdout)
    assert [model["name"] for model in models if model["is_default"]] == ["tiny"]


def test_health_says_it_with_its_exit_code(run_on, run):
    assert run_on("health").stdout == "serving\n"
    assert run_on("health", "--live").stdout == "serving\n"
    assert run_on("health", "--model", "tiny").stdout == "serving\n"
    assert run_on("health", "--model", "broken", exit_code=1).stdout == "not-serving\n"
    assert "the server has no model named 'nope' [MODEL_NOT_FOUND" in one_line(
        run_on("health", "--model", "nope", exit_code=2).stderr
    )
    one_line(run("health", "--server", NOBODY, exit_code=2).stderr)


def test_a_probe_of_health_imports_grpc_and_little_else(server):
    program = (
        "import contextlib, sys; from heatlens._cli import app\n"
        f"sys.argv = ['heatlens', 'health', '--server', '{server.address}']\n"
        "with contextlib.suppress(SystemExit): app()\n"
        "print(sorted({'typer', 'rich', 'numpy', 'PIL', 'google.protobuf', 'heatlens.v1'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "serving\n[]\n"


def test_the_command_begins_with_the_probe_or_the_application(server):
    for arguments, shown in ((["health"], "serving"), (["models"], "tiny"), (["--version"], "heatlens ")):
        program = f"import sys; sys.argv = ['heatlens', *{arguments}]; from heatlens._cli import app; app()"
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env={**os.environ, "HEATLENS_ADDRESS": server.address},
        )
        assert shown in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--live", "--model", "tiny"], "--live or --model"), (["--cert", "c.pem"], "--cert and --key")],
)
def test_a_probe_names_options_that_do_not_go_together(run, arguments, message):
    assert message in run("health", "--server", NOBODY, *arguments, exit_code=2).stderr


def test_bench_closed_loop(run_on):
    done = run_on("bench", "--requests", 20, "--concurrency", 4, "--json")
    report = json.loads(done.stdout)
    assert report["codes"] == {"OK": 20}
    assert (report["loop"], report["concurrency"], report["requests"]) == ("closed", 4, 20)
    assert 0 < report["latency"]["p50_ms"] <= report["latency"]["p99_ms"] <= report["latency"]["max_ms"]
    assert report["throughput_per_s"] > 0
    assert 1 <= report["mean_batch_size"] <= 4
    # No progress bar: stderr is not a terminal.
    assert done.stderr == ""


@pytest.mark.parametrize("arrivals", ["poisson", "constant"])
def test_bench_open_loop(run_on, chelsea_path, arrivals):
    done = run_on("bench", chelsea_path, "--rate", 100, "--arrivals", arrivals, "--requests", 10, "--json")
    report = json.loads(done.stdout)
    assert report["codes"] == {"OK": 10}
    assert (report["loop"], report["rate_per_s"], report["arrivals"]) == ("open", 100, arrivals)


def test_bench_as_text(run_on):
    text = run_on("bench", "--duration", 0.2, "--concurrency", 2).stdout
    for word in ("closed loop, 2 in flight", "throughput", "p99", "codes", "OK", "batch size"):
        assert word in text


def test_bench_errors(run_on, run):
    assert "MODEL_NOT_FOUND" in one_line(run_on("bench", "--model", "nope", exit_code=1).stderr)
    one_line(run("bench", "--server", NOBODY, exit_code=1).stderr)
    run_on("bench", "--rate", 5, "--concurrency", 2, exit_code=2)
    for value in (0, "nan", "inf", -1):
        run_on("bench", "--rate", value, exit_code=2)
        run_on("bench", "--duration", value, exit_code=2)
    run_on("bench", "--seed", -1, exit_code=2)
