"""The exporting process: what gets into it, and what becomes of its errors and its end."""

import errno
import subprocess
import sys

import pytest

from heatlens_server.backends.onnx.export_cache import ExportCache
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format
from heatlens_server.fleet import export_process
from heatlens_server.fleet.build import build
from heatlens_server.fleet.export import load_network, make_export
from server_process import SUPPORT


def test_modules_of_the_current_folder_do_not_get_into_the_exporting_process(tmp_path, monkeypatch):
    for name in ("torchvision", "timm", "json"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"garbage")
    model = ModelConfig(
        name="m", source="torchvision:squeezenet1_1", weights=str(tmp_path / "w.pth"), engine="onnxruntime"
    )
    with pytest.raises(ModelLoadError, match=r"weights file 'w\.pth' cannot be read"):
        build(model, cache_dir=tmp_path / "cache")


def test_weights_that_cannot_be_read_are_told_by_the_exporting_process(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"garbage")
    model = ModelConfig(
        name="m", source="torchvision:squeezenet1_1", weights=str(tmp_path / "w.pth"), engine="onnxruntime"
    )
    with pytest.raises(ModelLoadError, match=r"weights file 'w\.pth' cannot be read as plain tensors"):
        build(model, cache_dir=tmp_path / "cache")


def test_an_exporting_process_that_dies_harms_the_export_only(tmp_path, monkeypatch, caplog):
    dies = tmp_path / "dies"
    dies.write_text("#!/bin/sh\necho boom >&2\nkill -9 $$\n")
    dies.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(dies))
    # A layer that the embedded model's own graphs do not explain.
    config = ModelConfig(name="m", source="embedded:efficientnet_lite0", layers=("blocks.3",))
    model = build(config, cache_dir=tmp_path / "cache")
    model.engine.close()
    assert model.engine.info.engine_name == "torch"
    assert "not by onnxruntime: the exporting process ended with -9" in caplog.text
    assert "boom" in caplog.text
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == []


def test_an_exporting_process_that_is_dead_before_its_order_is_given_is_known_by_its_exit_code():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(["false"], text=True, **pipes) as process:
        assert process.wait() == 1
        assert export_process._follow(process, {}, pytest.fail) is None


def test_an_export_for_which_there_is_no_room_goes_to_a_temporary_folder(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(str(SUPPORT))
    model = ModelConfig(
        name="m", source="python:tiny_models:tiny_mlp", layers=("body",), preprocess={"resize_px": 64, "crop_px": 64}
    )
    full = ExportCache(tmp_path / "cache")
    writing = ExportCache.writing

    def disk(cache: ExportCache, key: str):
        if cache.folder == full.folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        return writing(cache, key)

    monkeypatch.setattr(ExportCache, "writing", disk)
    export = export_process.get_or_export(
        model, Format.ONNX, load=lambda: load_network(model), cache=full, retry=False, report=str, make=make_export
    )
    assert full.folder not in export.folder.parents
    assert export.manifest.source == model.source
    assert not export.was_cached
    assert "No space left on device" in caplog.text
    assert full.folder.is_dir()
    assert not [path for path in full.folder.iterdir() if path.suffix != ".lock"]


def test_the_operators_code_is_found_where_the_server_finds_it(tmp_path, monkeypatch):
    (tmp_path / "zoo_of_exports.py").write_text("from tiny_models import tiny_mlp\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = ModelConfig(
        name="m", source="python:zoo_of_exports:tiny_mlp", layers=("body",), preprocess={"resize_px": 64, "crop_px": 64}
    )
    phases: list[str] = []
    cache = ExportCache(tmp_path / "cache").writable()
    key = export_process.export_in_process(model, Format.ONNX, cache=cache, retry=False, report=phases.append)
    _, manifest = cache.find(key)
    assert manifest.source == model.source
    assert any("exporting for onnx" in phase for phase in phases)
