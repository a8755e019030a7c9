"""The real `heatlens-server export`: every format, wrong options, failures."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from heatlens import Client
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.core.graph_spec import MANIFEST_FILE, Output
from server_process import SUPPORT, wait_settled

COMMAND = Path(sys.executable).parent / "heatlens-server"
MODELS = """
[[models]]
name = "tiny"
source = "python:tiny_models:tiny"
layers = ["body", "stem"]
method = "hi-res-cam"
[models.preprocess]
resize_px = 64
crop_px = 64

[[models]]
name = "poisonous"
source = "python:tiny_models:poisonous"
layers = ["body"]
[models.preprocess]
resize_px = 64
crop_px = 64
"""


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEATLENS_")}
    return {**kept, "PYTHONPATH": str(SUPPORT)}


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "server.toml"
    path.write_text(MODELS)
    return path


@pytest.fixture
def run(config):
    def run(*arguments, exit_code=0):
        done = subprocess.run(
            [COMMAND, "export", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
            env=environment(),
        )
        assert done.returncode == exit_code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.mark.parametrize(
    ("file_format", "file", "options"),
    [
        ("onnx", "tiny.onnx", []),
        ("onnx", "tiny.onnx", ["--method", "cam", "--outputs", "cam,logits", "--precision", "fp16"]),
        ("torchscript", "tiny.ts", ["--classes", "any", "--input", "uint8", "--layer", "stem"]),
        ("pt2", "tiny.pt2", ["--method", "cam", "--outputs", "cam,logits", "--precision", "fp16"]),
    ],
)
def test_formats(run, config, tmp_path, file_format, file, options):
    out = tmp_path / "out"
    done = run("tiny", "-c", config, "--format", file_format, "-o", out, *options)
    manifest = read_manifest(out)
    passes = ["backward-1.onnx", "forward.onnx", "network.json", "tail-1.onnx"] if file_format == "onnx" else []
    assert sorted(path.name for path in out.iterdir()) == sorted(["manifest.json", file, *passes])
    assert manifest.format == file_format
    assert manifest.parity["compared_maps"] > 0
    assert str(out / file) in done.stdout
    assert "verified against float64 on 4 photos at batch sizes 1, 3, 4" in done.stdout
    phases = [line.split(" s  ")[1] for line in done.stderr.splitlines()]
    assert phases[0] == "loading tiny"
    recorded = ["recording tiny", "translating to ONNX"] if file_format == "onnx" else []
    assert phases[1 : 1 + len(recorded)] == recorded
    assert phases[1 + len(recorded)].startswith("differentiating tiny by ")
    assert phases[2 + len(recorded)] == f"writing {file}"
    (graph,) = manifest.graphs
    if options:
        expected = ("stem", "hi-res-cam", None) if file_format == "torchscript" else ("body", "cam", 1)
        assert (graph.layer, graph.method, manifest.classes) == expected
    else:
        assert (graph.layer, graph.method, manifest.classes, graph.outputs) == ("body", "hi-res-cam", 1, tuple(Output))


def test_a_served_export_answers_as_its_task_says_and_an_old_one_as_a_classifier(run, config, tmp_path, launch):
    config.write_text(MODELS.replace('layers = ["body", "stem"]', 'task = "multi-label-classification"', 1))
    run("tiny", "-c", config, "-o", tmp_path / "labels", "--no-verify")
    shutil.copytree(tmp_path / "labels", tmp_path / "old")
    content = json.loads((tmp_path / "old" / MANIFEST_FILE).read_text())
    assert content.pop("task") == "multi-label-classification"
    (tmp_path / "old" / MANIFEST_FILE).write_text(json.dumps(content))
    models = "".join(f'[[models]]\nname = "{name}"\nsource = "export:{name}"\n' for name in ("labels", "old"))
    running = launch(f'[server]\nlisten = "127.0.0.1:0"\n{models}')
    wait_settled(running.address)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    with Client(running.address) as client:
        labels, old = (client.explain(image, model=name, top_predictions=10) for name in ("labels", "old"))
        assert [model.task for model in client.models()] == ["multi-label-classification", "classification"]
    logits = np.array([prediction.logit for prediction in labels.predictions])
    assert [prediction.probability for prediction in labels.predictions] == pytest.approx(1 / (1 + np.exp(-logits)))
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert [prediction.probability for prediction in old.predictions] == pytest.approx(softmax, rel=1e-4)
    (warning,) = [line for line in running.log().splitlines() if "does not say its task" in line]
    assert "model old: the export does not say its task: taken as classification; set task" in warning


def test_a_wrong_option_is_named_before_torch_is_loaded(config, tmp_path):
    program = (
        "import sys; from heatlens_server.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    arguments = ["export", "tiny", "-c", str(config), "-o", str(tmp_path / "out"), "--format", "onnxx"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )
    message = "heatlens-server: --format: 'onnxx' is none of onnx, torchscript, pt2; did you mean onnx?\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert not (tmp_path / "out").exists()


def test_a_failure_is_one_line_and_leaves_nothing(run, config, tmp_path):
    done = run("poisonous", "-c", config, "-o", tmp_path / "out", exit_code=1)
    assert done.stdout == ""
    message = "heatlens-server: the network cannot be recorded for every batch size"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["server.toml"]


def test_an_export_that_is_stopped_leaves_nothing(config, tmp_path):
    command = [COMMAND, "export", "tiny", "-c", config, "-o", tmp_path / "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as made:
        for line in made.stderr:
            if "differentiating" in line:
                made.send_signal(signal.SIGTERM)
                break
        rest = made.communicate(timeout=60)[1]
        assert made.returncode == 143, rest
    assert [path.name for path in tmp_path.iterdir()] == ["server.toml"]
