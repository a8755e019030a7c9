"""An export for people: in its folder whole and verified, or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from heatlens_server.backends.onnx.manifest import Manifest, read_manifest
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.folder import Report, export_graph
from heatlens_server.backends.torch.export.verify import verify as verify_export
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MANIFEST_FILE, Format, GraphSpec
from heatlens_server.core.methods import Method

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Of every version of the manifest.
_MANIFEST_KEYS = {"manifest_version", "format", "model", "weights_version", "graphs", "files"}


def export_model(
    model: LoadedModel,
    spec: GraphSpec,
    *,
    file_format: Format,
    source: str,
    folder: Path,
    verify: bool,
    report: Report,
) -> Manifest:
    """Export one graph of a model into a folder.

    Args:
        model: left as it was.
        spec: which graph.
        file_format: what it is written as.
        source: where the architecture came from, for the manifest.
        folder: new, empty, or an earlier export, which is replaced once this one is done.
        verify: whether to run the export and compare it with the network in float64.
        report: told each phase.

    Returns:
        The manifest, as written.

    Raises:
        ExportError: the model is no classifier, the folder holds something else, the model cannot be exported like
            this, or the export is wrong. The folder is as it was.
    """
    if not model.task.traits.exportable:
        raise ExportError(f"exports are of classifiers, and this model is for {model.task}")
    check_target(folder)
    with _staged(folder) as staging:
        manifest = export_graph(model, spec, file_format=file_format, source=source, folder=staging, report=report)
        manifest.write(staging)
        if verify:
            # What is verified is what a reader of the folder gets.
            manifest = read_manifest(staging)
            manifest = replace(manifest, parity=verify_export(model, staging, manifest, report=report))
            manifest.write(staging)
        _deliver(staging, folder)
    return manifest


def check_target(folder: Path) -> None:
    """Raise ExportError unless a folder is new and can be made, is empty, or holds an earlier export."""
    anchor = _anchor(folder)
    if not anchor.is_dir():
        raise ExportError(f"{anchor} is not a folder")
    if not os.access(anchor, os.W_OK | os.X_OK):
        raise ExportError(f"{anchor} cannot be written")
    if not folder.is_dir():
        return
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise ExportError(f"{folder} cannot be read ({error.strerror or type(error).__name__})") from error
    if empty or _is_export(folder):
        return
    if (folder / MANIFEST_FILE).exists():
        raise ExportError(f"{folder} holds a {MANIFEST_FILE} that is not of a heatlens export: choose another folder")
    raise ExportError(f"{folder} is not empty and holds no earlier export (no {MANIFEST_FILE}): choose another")


def methods_of(model: LoadedModel) -> tuple[Method, ...]:
    """Ask the reference engine which closed forms a model's first layer has.

    Raises:
        ModelLoadError: it cannot explain the model.
    """
    engine = TorchEngine(model, device="cpu")
    engine.close()
    # The engine has laid the weights out for itself.
    model.module.to(memory_format=torch.contiguous_format)
    return tuple(method for method in engine.info.methods if method.traits.exportable)


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Make a folder on the same disk as another, for as long as the context lasts."""
    temporary = ""
    try:
        with tempfile.TemporaryDirectory(prefix=".heatlens-export-", dir=_anchor(folder)) as temporary:
            # With ordinary permissions, unlike what tempfile makes.
            staging = Path(temporary) / "export"
            staging.mkdir()
            yield staging
    except OSError as error:
        reason = error.strerror or type(error).__name__
        # The network is foreign code, and may open files of its own.
        if not temporary or error.errno in _DISK_FAULTS or _is_within(error.filename, Path(temporary), folder):
            raise ExportError(f"{folder} cannot be written ({reason})") from error
        raise ExportError(f"the export failed ({type(error).__name__}: {reason})") from error


def _is_within(filename: object, *folders: Path) -> bool:
    if not isinstance(filename, str | os.PathLike):
        return False
    path = Path(os.path.abspath(filename))  # noqa: PTH100 - what is a link must stay one
    return any(path.is_relative_to(folder.absolute()) for folder in folders)


def _anchor(folder: Path) -> Path:
    """The folder itself, or the nearest thing above it that exists."""
    anchor = folder.absolute()
    while not anchor.exists():
        anchor = anchor.parent
    return anchor


def _is_export(folder: Path) -> bool:
    """Whether a folder's manifest is one of ours; its files may be damaged or gone."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= _MANIFEST_KEYS


def _deliver(staging: Path, folder: Path) -> None:
    """Move an export to its place, over an earlier one."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(folder)
        return
    new, stale = {path.name for path in staging.iterdir()}, _earlier_files(folder)
    moved: list[Path] = []
    try:
        # The manifest last: until it is there, an earlier one tells of every file that is not its own.
        for name in [*sorted(new - {MANIFEST_FILE}), MANIFEST_FILE]:
            (staging / name).replace(folder / name)
            moved.append(folder / name)
    except BaseException:
        if not stale:
            for path in moved:
                path.unlink()
        raise
    for name in stale - new:
        (folder / name).unlink(missing_ok=True)


def _earlier_files(folder: Path) -> set[str]:
    """The files of the export that a folder holds, and none that people put beside them."""
    if not (folder / MANIFEST_FILE).exists():
        return set()
    try:
        return {MANIFEST_FILE, *read_manifest(folder).files}
    except ExportError:
        # Damaged: what its files were is not known for sure.
        return {MANIFEST_FILE}
