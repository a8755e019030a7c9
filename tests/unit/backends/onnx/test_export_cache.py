"""Exports on disk: found whole or not at all, whatever happens to the folder."""

import fcntl
import logging
import os
import threading
import time
from pathlib import Path

import pytest

from heatlens_server.backends.onnx.export_cache import ExportCache
from heatlens_server.backends.onnx.manifest import GraphFile, Manifest, sha256_of
from heatlens_server.core.graph_spec import Format, InputKind, Output
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import PreprocessSpec

KEY = "0123456789abcdef"


@pytest.fixture
def cache(tmp_path):
    return ExportCache(tmp_path / "cache")


def manifest_of(folder: Path) -> Manifest:
    return Manifest(
        format=Format.ONNX,
        model="m",
        source="test",
        weights_version="0",
        class_count=2,
        labels=("a", "b"),
        preprocess=PreprocessSpec(64, (64, 64), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear"),
        input=InputKind.UINT8,
        precision="fp32",
        classes=None,
        graphs=(GraphFile("graph.onnx", "body", Method.GRAD_CAM, tuple(Output)),),
        inputs=(),
        outputs=(),
        files={path.name: sha256_of(path) for path in folder.iterdir()},
        opset=20,
        versions={},
        parity={},
    )


def keep(cache: ExportCache, content: bytes = b"graph" * 100) -> tuple[Path, Manifest]:
    cache.folder.mkdir(exist_ok=True)
    with cache.writing(KEY) as unfinished:
        (unfinished.folder / "graph.onnx").write_bytes(content)
        return unfinished.keep(manifest_of(unfinished.folder))


def leftovers(cache: ExportCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if path.suffix != ".lock"}


def test_what_is_kept_is_found(cache):
    assert cache.find(KEY) is None
    folder, manifest = keep(cache)
    assert cache.find(KEY) == (folder, manifest)
    assert (folder / "graph.onnx").read_bytes() == b"graph" * 100
    assert leftovers(cache) == {KEY}


def test_what_is_not_kept_leaves_nothing(cache):
    cache.folder.mkdir()
    with cache.writing(KEY) as unfinished:
        (unfinished.folder / "graph.onnx").write_bytes(b"half")
    assert cache.find(KEY) is None
    assert leftovers(cache) == set()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "a flipped bit": lambda entry: flip(entry / "graph.onnx"),
    "a truncated file": lambda entry: truncate(entry / "graph.onnx"),
    "a missing file": lambda entry: (entry / "graph.onnx").unlink(),
    "no manifest": lambda entry: (entry / "manifest.json").unlink(),
    "a manifest of garbage": lambda entry: (entry / "manifest.json").write_bytes(b"\xff\x00{"),
    "a manifest of something else": lambda entry: (entry / "manifest.json").write_text("[1, 2]"),
    "another mean": lambda entry: (entry / "manifest.json").write_text(
        (entry / "manifest.json").read_text().replace("0.5", "0.6", 1)
    ),
    "no seal": lambda entry: (entry / "manifest.sha256").unlink(),
    "nothing at all": lambda entry: [path.unlink() for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_told_and_removed_and_can_be_made_again(cache, damage, caplog):
    entry, _ = keep(cache)
    DAMAGE[damage](entry)
    assert cache.find(KEY) is None
    assert "is damaged" in caplog.text
    assert leftovers(cache) == set()
    keep(cache)
    assert cache.find(KEY) is not None


def test_of_two_that_are_made_at_once_the_first_is_kept_and_both_can_be_used(cache):
    """Where files cannot be locked."""
    cache.folder.mkdir()
    with cache.writing(KEY) as slower:
        (slower.folder / "graph.onnx").write_bytes(b"slower")
        faster, _ = keep(cache, b"faster")
        used, _ = slower.keep(manifest_of(slower.folder))
    assert used == faster
    assert (used / "graph.onnx").read_bytes() == b"faster"
    assert leftovers(cache) == {KEY}


def test_a_damaged_rival_is_replaced(cache, caplog):
    cache.folder.mkdir()
    with cache.writing(KEY) as unfinished:
        (unfinished.folder / "graph.onnx").write_bytes(b"mine")
        rival, _ = keep(cache, b"rival")
        flip(rival / "graph.onnx")
        used, _ = unfinished.keep(manifest_of(unfinished.folder))
    assert (used / "graph.onnx").read_bytes() == b"mine"
    assert "is damaged" in caplog.text
    assert cache.find(KEY)[0] == used
    assert leftovers(cache) == {KEY}


@pytest.mark.parametrize("folder", [None, "file/cache"])
def test_a_cache_that_cannot_be_written_to_is_a_warning_and_another_is_used(tmp_path, folder, caplog):
    # A folder below a file cannot be made by anybody, root included.
    (tmp_path / "file").touch()
    cache = ExportCache(folder and tmp_path / folder)
    assert cache.find(KEY) is None
    assert cache.failure(KEY) is None
    cache.sweep()
    assert caplog.text == ""
    other = cache.writable()
    assert "cannot be used" in caplog.text
    used, manifest = keep(other)
    assert manifest.labels == ("a", "b")
    assert (used / "graph.onnx").read_bytes() == b"graph" * 100
    assert other.find(KEY) is not None


def test_a_cache_that_can_be_written_to_is_made(cache, caplog):
    assert cache.writable() is cache
    assert cache.folder.is_dir()
    assert caplog.text == ""


def given_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder another user's."""
    if os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize("change", [given_away, lambda folder, _: folder.chmod(0o777)], ids=["owner", "mode"])
def test_a_cache_that_others_may_write_to_is_not_used(cache, change, monkeypatch, caplog):
    keep(cache)
    assert cache.find(KEY) is not None
    change(cache.folder, monkeypatch)
    assert cache.find(KEY) is None
    assert "chown" in caplog.text
    assert "chmod o-w" in caplog.text
    assert "server.cache_dir" in caplog.text
    other = cache.writable()
    assert other.folder != cache.folder
    keep(other)
    assert other.find(KEY) is not None
    # Nothing of it was touched.
    assert leftovers(cache) == {KEY}


def test_failures_are_remembered_until_they_are_forgotten(cache):
    keep(cache)
    assert cache.failure(KEY) is None
    cache.remember_failure(KEY, "no gradient")
    assert ExportCache(cache.folder).failure(KEY) == "no gradient"
    cache.forget_failure(KEY)
    assert cache.failure(KEY) is None


def test_only_one_makes_an_export_and_the_others_wait_for_it(cache):
    cache.folder.mkdir()
    waiting, entered = threading.Event(), threading.Event()

    def second() -> None:
        with cache.making(KEY, lambda _line: waiting.set()):
            entered.set()

    thread = threading.Thread(target=second)
    with cache.making(KEY, pytest.fail):
        thread.start()
        assert waiting.wait(10)
        assert not entered.is_set()
    thread.join(10)
    assert entered.is_set()


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(cache):
    cache.sweep()
    keep(cache)
    (cache.folder / "unfinished-killed").mkdir()
    (cache.folder / "unfinished-killed" / "graph.onnx").touch()
    with cache.making("another", pytest.fail), cache.writing("another") as unfinished:
        ExportCache(cache.folder).sweep()
        assert leftovers(cache) == {KEY, unfinished.folder.name}
    assert leftovers(cache) == {KEY}


def test_where_files_cannot_be_locked_exports_are_made_and_leftovers_removed_after_a_day(cache, monkeypatch):
    def refuse(*_args):
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    cache.folder.mkdir()
    with cache.making(KEY, pytest.fail):
        keep(cache)
    for name, age_s in (("unfinished-old", 2 * 86400), ("unfinished-new", 60)):
        (cache.folder / name).mkdir()
        os.utime(cache.folder / name, (time.time() - age_s,) * 2)
    cache.sweep()
    assert leftovers(cache) == {KEY, "unfinished-new"}


def test_a_file_in_an_entrys_place_is_told_and_replaced(cache, caplog):
    entry, _ = keep(cache)
    cache.remove(KEY)
    entry.write_text("a file")
    assert cache.find(KEY) is None
    assert "is damaged" in caplog.text
    keep(cache)
    assert cache.find(KEY) is not None
    assert leftovers(cache) == {KEY}


def test_removing_what_is_not_there_is_nothing(cache, caplog):
    caplog.set_level(logging.WARNING)
    cache.remove(KEY)
    keep(cache)
    cache.remove(KEY)
    cache.remove(KEY)
    assert cache.find(KEY) is None
    assert caplog.text == ""
