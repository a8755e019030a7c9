"""What is said where a package is missing; and that every extra that is named exists and holds what it should."""

import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.extras import brought_by, is_installed

ROOT = Path(__file__).parents[3]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NAMED = re.compile(r"(?:heatlens|'\.)\[([a-z,]+)\]")


def packages_of(extra: str) -> set[str]:
    """The names of the packages that an extra brings, those of the extras that it includes among them."""
    found = set()
    for requirement in EXTRAS[extra]:
        name, _, included = re.match(r"([\w-]+)(\[([\w,]+)\])?", requirement).groups()
        found |= set().union(*map(packages_of, included.split(","))) if name == "heatlens" else {name}
    return found


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    # Another test may have imported it.
    monkeypatch.delitem(sys.modules, "timm.data", raising=False)
    assert not is_installed("timm")
    with (
        pytest.raises(ModelLoadError, match=r"needs timm, which is not installed: pip install 'heatlens\[torch\]'"),
        brought_by("torch"),
    ):
        importlib.import_module("timm.data")


def test_a_missing_module_of_our_own_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match=r"heatlens_server\.nothing"), brought_by("torch"):
        importlib.import_module("heatlens_server.nothing")


def test_a_server_needs_neither_torch_nor_onnx():
    heavy = {"torch", "torchvision", "timm", "safetensors", "onnx", "onnx-ir", "onnxscript"}
    for extra in ("server", "cpu", "gpu"):
        assert not packages_of(extra) & heavy
    assert heavy <= packages_of("torch")
    assert packages_of("onnx") == {"onnx", "onnx-ir"}


def test_no_extra_brings_two_onnxruntimes_and_a_server_has_one():
    runtimes = {extra: {name for name in packages_of(extra) if name.startswith("onnxruntime")} for extra in EXTRAS}
    assert runtimes["server"] == runtimes["cpu"] == runtimes["dev"] == {"onnxruntime"}
    assert runtimes["gpu"] == {"onnxruntime-gpu"}
    assert runtimes["torch"] == set()  # it goes with either


def test_developers_have_everything_but_the_other_onnxruntime():
    assert set().union(*map(packages_of, EXTRAS)) - packages_of("dev") == {"onnxruntime-gpu"}


def test_every_extra_that_is_named_exists():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
    files += [path for room in ("client", "server", "examples") for path in (ROOT / room).rglob("*.py")]
    named = {extra for path in files for list_ in NAMED.findall(path.read_text()) for extra in list_.split(",")}
    assert {"server", "gpu", "torch", "video"} <= named <= set(EXTRAS)
