"""Engines behind the real command: onnxruntime without torch, warm starts, exports, damage, interruption."""

import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from heatlens import Client
from server_process import SUPPORT, wait_settled

LISTEN = '[server]\nlisten = "127.0.0.1:0"\n'
WARM_START_S = 5.0

TINY = """
[[models]]
name = "tiny"
source = "python:tiny_models:tiny"
layers = ["body"]
preprocess = { resize_px = 64, crop_px = 64 }
"""


def entries(cache: Path) -> list[Path]:
    """The finished exports of a cache."""
    return sorted(path.parent for path in cache.glob("*/manifest.json") if not path.parent.name.startswith("unfin"))


@pytest.mark.serial
def test_the_default_server_starts_warm_on_onnxruntime_without_torch(launch, server, chelsea):
    started = time.monotonic()
    running = launch(LISTEN)
    wait_settled(running.address)
    assert time.monotonic() - started < WARM_START_S
    with Client(running.address) as client, Client(server.address) as other:
        (model,) = client.models()
        assert (model.engine, model.device, model.precision) == ("onnxruntime", "cpu", "fp32")
        (reference,) = [model for model in other.models() if model.name == "efficientnet_lite0"]
        assert reference.engine == "torch"
        assert (model.version, model.layers, model.methods) == (reference.version, reference.layers, reference.methods)
        for layer in model.layers:
            options = {"top_k": 3, "layers": [layer], "method": "layer-cam"}
            found = client.explain(chelsea, **options)
            expected = other.explain(chelsea, model="efficientnet_lite0", **options)
            for a, b in zip(found.explanations, expected.explanations, strict=True):
                assert (a.class_id, a.label) == (b.class_id, b.label)
                assert a.probability == pytest.approx(b.probability, abs=1e-4)
                assert b.heatmap.values.max() == 1
                np.testing.assert_allclose(a.heatmap.values, b.heatmap.values, atol=1e-3)
        assert found.explanations[0].label == "tiger cat"
    assert not running.has_torch()
    assert server.has_torch()
    assert "export" not in running.log()


@pytest.fixture(scope="module")
def exported_twice(tmp_path_factory):
    """The cache that two processes filled which needed the same export at once, and what they said."""
    folder = tmp_path_factory.mktemp("twice")
    (folder / "server.toml").write_text(f'[server]\ncache_dir = "cache"\n{TINY}')

    def check(_: int) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "heatlens_server", "warm", "-c", folder / "server.toml"],
            capture_output=True,
            text=True,
            timeout=280,
            check=True,
            env={"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"},
        )
        return done.stderr

    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(check, range(2)))
    return folder / "cache", logs


@pytest.mark.timeout(300)
def test_two_processes_that_need_the_same_export_make_it_once(exported_twice):
    cache, logs = exported_twice
    assert all("tiny: ready for onnxruntime" in log for log in logs)
    assert sum("translating to ONNX" in log for log in logs) == 1
    assert len(entries(cache)) == 1


@pytest.mark.timeout(300)
def test_a_damaged_export_is_told_and_made_again(exported_twice, tmp_path, launch, chelsea):
    def explain() -> tuple[np.ndarray, str]:
        running = launch(f'{LISTEN}cache_dir = "cache"\n{TINY}')
        wait_settled(running.address)
        with Client(running.address) as client:
            assert client.models()[0].engine == "onnxruntime"
            values = client.explain(chelsea).explanations[0].heatmap.values
        running.process.terminate()
        assert running.process.wait(20) == 0
        (tmp_path / "port").unlink()
        return values, running.log()

    shutil.copytree(exported_twice[0], tmp_path / "cache")
    first, log = explain()
    assert "exporting" not in log
    (entry,) = entries(tmp_path / "cache")
    content = bytearray((entry / "weights.bin").read_bytes())
    content[len(content) // 2] ^= 0x40
    (entry / "weights.bin").write_bytes(content)
    second, log = explain()
    assert "is damaged (weights.bin is not the file that was exported)" in log
    assert "exporting for onnx, which is done once" in log
    np.testing.assert_array_equal(second, first)
    assert entries(tmp_path / "cache") == [entry]


@pytest.mark.serial
def test_sigterm_during_an_export_ends_everything_and_leaves_nothing_that_is_believed(tmp_path, launch):
    # A layer that the embedded model's own graphs do not explain.
    model = '[[models]]\nname = "lite"\nsource = "embedded:efficientnet_lite0"\nlayers = ["blocks.3"]\n'
    running = launch(f'{LISTEN}cache_dir = "cache"\n{model}')
    deadline = time.monotonic() + 60
    while "recording lite" not in running.log():
        assert time.monotonic() < deadline, running.log()
        time.sleep(0.05)
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert children
    started = time.monotonic()
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0, running.log()
    assert time.monotonic() - started < 10
    assert psutil.wait_procs(children, timeout=20)[1] == []
    assert entries(tmp_path / "cache") == []


def test_what_auto_falls_back_from_is_in_the_log(tmp_path, launch, chelsea):
    running = launch(f'{LISTEN}cache_dir = "cache"\n' + TINY.replace("models:tiny", "models:poisonous"))
    wait_settled(running.address)
    with Client(running.address) as client:
        assert client.models()[0].engine == "torch"
        assert client.explain(chelsea).explanations
    warnings = [line for line in running.log().splitlines() if "warning" in line and "are assumed" not in line]
    assert len(warnings) == 1
    assert "model tiny is run by torch, not by onnxruntime: the network cannot be recorded" in warnings[0]
