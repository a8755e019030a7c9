"""An export for people: in its folder whole, or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MANIFEST_FILE

_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

# Of every version of the manifest.
_MANIFEST_KEYS = {"manifest_version", "format", "model", "weights_version", "graphs", "files"}


@contextmanager
def delivered(folder: Path) -> Iterator[Path]:
    """A new folder for the files of an export, which take their place in `folder` when the context ends well.

    Raises:
        ExportError: the folder holds something else, or cannot be written. It is as it was.
    """
    check_folder(folder)
    with _staged(folder) as staging:
        yield staging
        _deliver(staging, folder)


def check_folder(folder: Path) -> None:
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
