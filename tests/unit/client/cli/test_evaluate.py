"""`heatlens evaluate` against a scripted server: what it prints and writes, and how it ends."""

import contextlib
import json
import signal
import subprocess
import threading
from unittest.mock import patch

import cv2
import grpc
import pytest
from typer.testing import CliRunner

from cli_process import start_cli
from evaluation_peer import SERVED, failing, image_of, measuring, refusing
from heatlens._cli.commands import app


@pytest.fixture
def served(peer):
    return measuring(peer)


@pytest.fixture
def run(served, tmp_path):
    """Run `heatlens evaluate` on images 1 to 3 in files."""
    paths = [tmp_path / f"{number}.jpg" for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        path.write_bytes(image_of(number))

    def run(*options):
        command = ["evaluate", "--server", served.address, *options, *map(str, paths)]
        return CliRunner().invoke(app, command)

    return run


def test_command_prints_a_table_and_writes_files(run, tmp_path):
    done = run("--methods", "grad-cam, score-cam", "--metrics", "deletion,insertion", "-o", str(tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[2:]] == ["grad-cam", "score-cam", "random-cam"]
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["images"] == [str(tmp_path / f"{number}.jpg") for number in (1, 2, 3)]
    assert report["methods"][0]["metrics"]["deletion"]["mean"] == pytest.approx(0.7)
    assert cv2.imread(str(tmp_path / "out" / "evaluation.png")) is not None


def test_command_takes_folders_and_globs(served, tmp_path):
    for number in (1, 2, 3):
        (tmp_path / f"{number}.jpg").write_bytes(image_of(number))
    for images in (tmp_path, tmp_path / "*.jpg"):
        command = ["evaluate", "--server", served.address, "--metrics", "deletion", "--json", str(images)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["images"] == [str(tmp_path / f"{number}.jpg") for number in (1, 2, 3)]


def test_command_says_what_is_left_out(run, served):
    refusing(served, "layer-cam")
    done = run("--metrics", "deletion", "--layer", "a", "--json")
    assert done.exit_code == 0, done.output
    assert "heatlens: left out layer-cam: not with layer-cam\n" in done.stderr
    report = json.loads(done.stdout)
    assert [row["method"] for row in report["methods"]] == ["grad-cam", "random-cam"]
    assert report["left_out"] == {"layer-cam": "not with layer-cam"}


def test_command_reports_failed_images(run, served, tmp_path):
    failing(served, grpc.StatusCode.INVALID_ARGUMENT, reason="IMAGE_UNDECODABLE", field="image.encoded")
    done = run("--json", "--metrics", "sparseness", "--methods", "all")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert len(report["images"]) == 2
    assert len(report["methods"]) == len(SERVED)
    assert report["failures"][0]["image"] == str(tmp_path / "2.jpg")
    assert f"{tmp_path / '2.jpg'}: no [IMAGE_UNDECODABLE" in done.stderr


def test_command_without_matplotlib(run, served, tmp_path):
    with patch("heatlens._cli.evaluate.find_spec", return_value=None):
        done = run("-o", str(tmp_path / "out"))
        assert done.exit_code == 1
        assert "pip install 'heatlens[plot]'" in done.stderr
        assert served.asked == []
        assert run("--metrics", "deletion").exit_code == 0


def test_command_tells_wrong_names(run):
    done = run("--methods", "grad-kam")
    assert done.exit_code == 1
    assert "methods: expected some of grad-cam" in done.stderr


def test_interrupt_does_not_wait_for_open_calls(served, tmp_path):
    arrived, release = threading.Event(), threading.Event()
    served.replies[0] = lambda request, context: arrived.set() or (release.wait(60) and served.answer())
    path = tmp_path / "1.jpg"
    path.write_bytes(image_of(1))
    process = start_cli("evaluate", "--server", served.address, path)
    try:
        assert arrived.wait(20)
        # Python drops an exception that a signal raises inside a destructor: one presses Ctrl-C again.
        for _ in range(4):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
                break
        stdout, stderr = process.communicate(timeout=20)
        assert process.returncode == 130, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
    finally:
        release.set()
        process.kill()
        process.communicate()
