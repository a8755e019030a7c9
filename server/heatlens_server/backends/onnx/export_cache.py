"""Artefacts on disk, kept from one start to the next. No torch in here.

One folder per key, `KEY/`, written beside its place and renamed, so that a folder of that name is complete. Everything
in it is covered by hashes, which are checked at every use. `KEY.failed` remembers why there is none, `KEY.lock` keeps
two processes from making the same one at the same time.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from heatlens_server.backends.onnx.manifest import Manifest, read_manifest
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MANIFEST_FILE

_log = logging.getLogger(__name__)

_SEAL_FILE = "manifest.sha256"
_UNFINISHED = "unfinished-"
# What a killed process left half written is removed by a later one, where folders cannot be locked after a day.
_STALE_S = 24 * 3600.0
_REASON_CHARACTERS = 2000

# Of artefacts that could not be kept: they live as long as the process, whose end removes them.
_temporary: list["tempfile.TemporaryDirectory[str]"] = []


class ArtefactCache:
    """A folder of artefacts. Safe for several threads and processes.

    A folder that cannot be written to is a warning, not an error: artefacts are then made anew by each process.
    """

    def __init__(self, folder: Path | None) -> None:
        """Use a folder, which is made when it is first written to.

        Args:
            folder: of the cache; None for none.
        """
        self._folder = folder

    @property
    def folder(self) -> Path | None:
        """Of the cache; None for none."""
        return self._folder

    @property
    def is_writable(self) -> bool:
        """Whether artefacts can be kept. Makes the folder."""
        if self._folder is None:
            return False
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            return False
        return os.access(self._folder, os.W_OK | os.X_OK)

    def find(self, key: str) -> tuple[Path, Manifest] | None:
        """Return an artefact's folder and manifest; None if there is none. A damaged one is removed.

        Args:
            key: of the artefact.
        """
        if self._folder is None:
            return None
        entry = self._folder / key
        # Also what is no folder: nothing could be put in its place.
        if not os.path.lexists(entry):
            return None
        try:
            return entry, _read_sealed(entry)
        except ExportError as error:
            _log.warning("the cached export %s is damaged (%s): it is removed", entry, error)
            self.remove(key)
            return None

    def remove(self, key: str) -> None:
        """Remove an artefact, if there is one."""
        if self._folder is None:
            return
        # Under another name first: a half-removed folder must not be found.
        with contextlib.suppress(OSError), contextlib.closing(_claim(self._folder, None)) as away:
            (self._folder / key).rename(away.folder / key)

    def failure(self, key: str) -> str | None:
        """Return why an earlier start could not make this artefact; None if it could or never tried."""
        if self._folder is None:
            return None
        try:
            return self._failure_path(key).read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError):
            return None

    def remember_failure(self, key: str, reason: str) -> None:
        """Remember that this artefact cannot be made."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._failure_path(key).write_text(reason[:_REASON_CHARACTERS], encoding="utf-8")

    def forget_failure(self, key: str) -> None:
        """Forget that this artefact could not be made."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._failure_path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def making(self, key: str, report: Callable[[str], None]) -> Iterator[None]:
        """Be the only one of all processes and threads that makes this artefact; wait for another that does.

        Where files cannot be locked, two may make it at once, and one of the two is kept.

        Args:
            key: of the artefact.
            report: told if somebody else is making it.
        """
        lock = self._open_lock(key)
        if lock is None:
            yield
            return
        try:
            with contextlib.suppress(OSError):
                _lock(lock, report)
            yield
        finally:
            # Closing a file gives up its lock.
            os.close(lock)

    def sweep(self) -> None:
        """Remove what processes that are gone left half written."""
        with contextlib.suppress(OSError), _alone_in(self._folder) as folder:
            for path in folder.glob(f"{_UNFINISHED}*"):
                if not _is_held(path):
                    shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator["Unfinished"]:
        """Make an empty folder to write an artefact in. What is not kept is removed."""
        unfinished = self._unfinished(key)
        try:
            yield unfinished
        finally:
            unfinished.close()

    def _unfinished(self, key: str) -> "Unfinished":
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                return _claim(self._folder, self._folder / key)
            except OSError as error:
                reason = error.strerror or type(error).__name__
        else:
            reason = "there is no home directory"
        _log.warning(
            "the cache %s cannot be written to (%s): every start will export its models anew; set server.cache_dir",
            self._folder or "",
            reason,
        )
        return Unfinished(Path(tempfile.mkdtemp(prefix="heatlens-")), None)

    def _failure_path(self, key: str) -> Path:
        return (self._folder or Path()) / f"{key}.failed"

    def _open_lock(self, key: str) -> int | None:
        if self._folder is None:
            return None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self._folder / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return None


class Unfinished:
    """An artefact in the making.

    Attributes:
        folder: exists and is empty.
    """

    def __init__(self, folder: Path, place: Path | None, hold: int | None = None) -> None:
        """Write an artefact in a folder.

        Args:
            folder: where it is made.
            place: where it belongs; None for nowhere.
            hold: descriptor of the folder, whose lock says that somebody is at it; None for no lock.
        """
        self.folder = folder
        self._place = place
        self._hold = hold
        self._kept = False

    def keep(self, manifest: Manifest) -> tuple[Path, Manifest]:
        """Write the manifest and put the artefact in its place.

        Returns:
            Where it is now, and the manifest as it is read there.

        Raises:
            ExportError: what was written is not what is read.
            OSError: the disk is full.
        """
        manifest.write(self.folder)
        (self.folder / _SEAL_FILE).write_text(_digest_of_manifest(self.folder), encoding="ascii")
        if self._place is not None:
            try:
                self.folder.rename(self._place)
            except OSError:
                # Another process was faster; else the place cannot be written to.
                with contextlib.suppress(ExportError):
                    return self._place, _read_sealed(self._place)
            else:
                self._kept = True
                return self._place, _read_sealed(self._place)
        # Removed at the end of the process.
        home = tempfile.TemporaryDirectory(prefix="heatlens-", ignore_cleanup_errors=True)
        _temporary.append(home)
        moved = Path(shutil.move(self.folder, Path(home.name) / "export"))
        self._kept = True
        return moved, _read_sealed(moved)

    def close(self) -> None:
        """Remove what was not kept, and let go of the folder."""
        if not self._kept:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None


@contextlib.contextmanager
def _alone_in(folder: Path | None) -> Iterator[Path]:
    """Keep others from making or sweeping unfinished folders, for an instant.

    Raises:
        OSError: there is no such folder.
    """
    descriptor = os.open(folder or "", os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder or Path()
    finally:
        os.close(descriptor)


def _claim(folder: Path, place: Path | None) -> Unfinished:
    """Make an unfinished folder that nobody sweeps while this process lives."""
    with _alone_in(folder):
        made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        hold = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):
            fcntl.flock(hold, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Unfinished(made, place, hold)


def _is_held(path: Path) -> bool:
    """Whether a process may still be writing an unfinished folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    # No locks here: its age has to do.
    except OSError:
        return time.time() - os.fstat(descriptor).st_mtime < _STALE_S
    else:
        return False
    finally:
        os.close(descriptor)


def _lock(lock: int, report: Callable[[str], None]) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report("somebody else is making the same export: waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def _read_sealed(entry: Path) -> Manifest:
    """Read a manifest, and check that it and all the files that it names are as they were written.

    Raises:
        ExportError: they are not.
    """
    manifest = read_manifest(entry)
    try:
        sealed, found = (entry / _SEAL_FILE).read_text(encoding="ascii"), _digest_of_manifest(entry)
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{_SEAL_FILE} cannot be read ({type(error).__name__})") from error
    if sealed != found:
        raise ExportError(f"{MANIFEST_FILE} is not the file that was written")
    return manifest


def _digest_of_manifest(entry: Path) -> str:
    return hashlib.sha256((entry / MANIFEST_FILE).read_bytes()).hexdigest()
