"""The real `heatlens-server` command: check, serve, exit codes, and what goes to stdout and stderr."""

import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import skimage

from heatlens import Client
from heatlens_server.config import Config
from server_process import SUPPORT
from server_toml import model_toml

COMMAND = Path(sys.executable).parent / "heatlens-server"
TINY = "\n" + model_toml("tiny", engine=None, layers=("body", "stem"))
BROKEN = """
[[models]]
name = "broken"
source = "python:tiny_models:broken"
"""


@pytest.fixture
def run(tmp_path):
    """Run the installed command with a configuration file; HEATLENS_* as given and nothing else."""

    def run(command, toml="", *options, exit_code, **variables):
        path = tmp_path / "server.toml"
        path.write_text(toml)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HEATLENS_")}
        done = subprocess.run(
            [COMMAND, command, "--config", path, *options],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(SUPPORT), **variables},
        )
        assert done.returncode == exit_code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def test_version():
    done = subprocess.run([COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (f"{version('heatlens')}\n", "")


OWN_CACHE = '[server]\ncache_dir = "cache"\n'


def test_no_arguments_is_help():
    done = subprocess.run([COMMAND], capture_output=True, text=True, check=False)
    assert "serve" in done.stdout + done.stderr
    assert "check" in done.stdout + done.stderr


def test_check_prints_the_effective_configuration_and_nothing_else_on_stdout(run):
    done = run(
        "check",
        '[server]\nmax_targets = 7\ntoken = "s3cret"\ncache_dir = "cache"' + TINY,
        exit_code=0,
        HEATLENS_SERVER__GRACE_S="5",
    )
    effective = json.loads(done.stdout)
    assert (effective["server"]["max_targets"], effective["server"]["grace_s"]) == (7, 5.0)
    assert effective["server"]["max_queue_length"] == Config().server.max_queue_length
    assert [model["name"] for model in effective["models"]] == ["tiny"]
    assert effective["server"]["token"] == "**********"
    assert "s3cret" not in done.stdout + done.stderr
    *_, follows, report = done.stderr.splitlines()
    assert follows.startswith("tiny: onnxruntime takes over once the model is exported")
    assert report.startswith(
        "tiny: ok: torch on cpu in fp32, classification, 64x64 px, 10 classes, layers body, stem; methods cam, "
    )


def test_warm_fills_the_cache_for_what_comes_after_it_reports_all_and_fails_if_one_model_does(run):
    warmed = run("warm", OWN_CACHE + BROKEN + TINY, exit_code=1)
    assert warmed.stdout == ""
    lines = warmed.stderr.splitlines()
    assert lines[0].startswith("broken: FAILED: ")
    assert "tiny: exporting for onnx, which is done once: later starts take it from the cache" in lines
    assert lines[-1] == "tiny: ready for onnxruntime"
    assert run("warm", OWN_CACHE + TINY, exit_code=0).stderr.splitlines()[-1:] == ["tiny: ready for onnxruntime"]
    *_, report = run("check", OWN_CACHE + TINY, exit_code=0).stderr.splitlines()
    assert report.startswith("tiny: ok: onnxruntime on cpu in fp32")


def test_check_fails_if_one_model_does_reports_all_and_explains_a_photo_by_the_others(run, tmp_path):
    done = run("check", BROKEN + TINY, "--image", Path(skimage.data_dir, "chelsea.png"), exit_code=1)
    assert [model["name"] for model in json.loads(done.stdout)["models"]] == ["broken", "tiny"]
    broken, *_, tiny = done.stderr.splitlines()
    assert broken.startswith("broken: FAILED: ")
    # For the operator: clients see no path (tests of loading).
    assert "/secret/path" in broken
    assert tiny.startswith("tiny: ok: ")
    lines = [line for line in done.stderr.splitlines() if line.startswith("tiny: chelsea.png")]
    assert [line.partition(": class ")[0] for line in lines] == ["tiny: chelsea.png", "tiny: chelsea.png mirrored"]
    assert (tmp_path / "tiny-check.png").stat().st_size > 10_000


def test_check_of_a_photo_that_is_not_there(run, tmp_path):
    missing = run("check", TINY, "--image", tmp_path / "no.jpg", exit_code=2)
    assert "--image" in missing.stderr


@pytest.mark.parametrize(
    ("command", "toml", "variables", "message"),
    [
        ("serve", "[server]\nlissten = 1", {}, "server.lissten: unknown key"),
        ("serve", "", {"HEATLENS_SERVER__MAX_TARGETS": "many"}, "server.max_targets: "),
        ("check", "[server]\nlissten = 1", {}, "server.lissten: unknown key"),
        ("check", "[server]\ngrace_s = -1", {}, "server.grace_s: "),
        ("check", '[[models]]\nname = "a"\nsource = "b"', {}, "models[0].source: "),
        ("check", '[server]\ntoken_file = "nowhere"', {}, "server.token_file: the file does not exist"),
        ("check", "[server", {}, "server.toml: not valid TOML"),
        ("check", "", {"HEATLENS_SERVER__MAX_TARGETS": "many"}, "server.max_targets: "),
        ("check", "", {"HEATLENS_MODELS": "["}, "HEATLENS_MODELS: is no JSON"),
    ],
)
def test_wrong_configuration_names_the_key(run, command, toml, variables, message):
    done = run(command, toml, exit_code=2, **variables)
    assert done.stdout == ""
    assert done.stderr.startswith("heatlens-server: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_wrong_key_is_told_at_once(run):
    done = run("check", "[server]\nmax_targets = 0\nmax_queue_length = 0", exit_code=2)
    assert ["server.max_targets" in done.stderr, "server.max_queue_length" in done.stderr] == [True, True]


def test_missing_configuration_file(tmp_path):
    done = subprocess.run([COMMAND, "check", "-c", tmp_path / "no.toml"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no.toml: No such file or directory" in done.stderr


def test_empty_token_file_stops_the_start(run, tmp_path):
    (tmp_path / "token").write_text("\n")
    done = run("serve", '[server]\ntoken_file = "token"\nlisten = "127.0.0.1:0"' + TINY, exit_code=2)
    assert "server.token_file: is empty" in done.stderr


def test_serve_listen_beats_environment_beats_file(tmp_path):
    config, port_file = tmp_path / "server.toml", tmp_path / "port"
    # Ports that cannot be bound: the file's and the environment's address must not be used.
    config.write_text('[server]\nlisten = "192.0.2.1:1"\nmax_targets = 5\nmax_queue_length = 6\n' + TINY)
    process = subprocess.Popen(
        [COMMAND, "serve", "-c", config, "--listen", "127.0.0.1:0", "--port-file", port_file],
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(SUPPORT),
            "HEATLENS_SERVER__LISTEN": "192.0.2.1:2",
            "HEATLENS_SERVER__MAX_TARGETS": "9",
        },
    )
    try:
        deadline = time.monotonic() + 60
        while not (port_file.exists() and port_file.read_text().endswith("\n")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with Client(f"127.0.0.1:{port_file.read_text().strip()}", wait_for_ready=True) as client:
            info = client.server_info()
    finally:
        process.terminate()
        _, log = process.communicate(timeout=30)
    assert (info.max_targets, info.max_queue_length) == (9, 6)
    assert process.returncode == 0, log
    assert "listening on 127.0.0.1:0" in log
