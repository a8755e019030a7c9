"""Exports on disk, kept from one start to the next. No torch in here.

One folder per key, `KEY/`, written beside its place and renamed, so that a folder of that name is complete. Everything
in it is covered by hashes, which are checked at every use. `KEY.failed` remembers why there is none. Who holds
`KEY.lock` makes the export: no other process or thread does at the same time, and none removes what is half written.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from heatlens_server.backends.onnx.manifest import Manifest, read_manifest
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import MANIFEST_FILE

if TYPE_CHECKING:
    from filelock import FileLock

_log = logging.getLogger(__name__)

_SEAL_FILE = "manifest.sha256"
_UNFINISHED = "unfinished-"
# What a killed process left half written is removed by a later one, where files cannot be locked after a day.
_STALE_S = 24 * 3600.0
_REASON_CHARACTERS = 2000

# Of exports that cannot be kept: they live as long as the process, whose end removes them.
_temporary: list["tempfile.TemporaryDirectory[str]"] = []


class ExportCache:
    """A folder of exports. Safe for several threads and processes."""

    def __init__(self, folder: Path | None) -> None:
        """Use a folder, which is made when it is first written to.

        Args:
            folder: of the cache; None for one in which nothing is found.
        """
        self.folder = folder

    def writable(self) -> "ExportCache":
        """This cache if it can be written to; else a temporary one, with a warning."""
        reason = "there is no home directory"
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                with tempfile.TemporaryFile(dir=self.folder):
                    if self._is_trusted():
                        return self
                reason = "others may write to it"
            except OSError as error:
                reason = error.strerror or type(error).__name__
        return self.temporary(reason)

    def temporary(self, reason: str) -> "ExportCache":
        """A cache for this process, in place of this one, which a warning says cannot be used, and why."""
        _log.warning(
            "the cache %s cannot be used (%s): every start will export its models anew; set server.cache_dir",
            self.folder or "",
            reason,
        )
        _temporary.append(tempfile.TemporaryDirectory(prefix="heatlens-", ignore_cleanup_errors=True))
        return ExportCache(Path(_temporary[-1].name))

    def find(self, key: str) -> tuple[Path, Manifest] | None:
        """Return an export's folder and manifest; None if there is none. A damaged one is removed.

        Args:
            key: of the export.
        """
        if self.folder is None:
            return None
        entry = self.folder / key
        # Also what is no folder: nothing could be put in its place.
        if not os.path.lexists(entry) or not self._is_trusted():
            return None
        try:
            return entry, _read_sealed(entry)
        except ExportError as error:
            _log.warning("the cached export %s is damaged (%s): it is removed", entry, error)
            self.remove(key)
            return None

    def remove(self, key: str) -> None:
        """Remove an export, if there is one."""
        entry = self._path(key)
        # Under another name first: a half-removed folder must not be found.
        with (
            contextlib.suppress(OSError),
            tempfile.TemporaryDirectory(
                prefix=f"{_UNFINISHED}{key}-", dir=entry.parent, ignore_cleanup_errors=True
            ) as away,
        ):
            entry.rename(Path(away) / key)

    def failure(self, key: str) -> str | None:
        """Return why an earlier start could not make this export; None if it could or never tried."""
        try:
            return self._path(f"{key}.failed").read_text(encoding="utf-8") or None
        except (OSError, UnicodeDecodeError):
            return None

    def remember_failure(self, key: str, reason: str) -> None:
        """Remember that this export cannot be made."""
        with contextlib.suppress(OSError):
            self._path(f"{key}.failed").write_text(reason[:_REASON_CHARACTERS], encoding="utf-8")

    def forget_failure(self, key: str) -> None:
        """Forget that this export could not be made."""
        with contextlib.suppress(OSError):
            self._path(f"{key}.failed").unlink(missing_ok=True)

    @contextlib.contextmanager
    def making(self, key: str, report: Callable[[str], None]) -> Iterator[None]:
        """Be the only one of all processes and threads that makes this export; wait for another that does.

        Where files cannot be locked, two may make it at once, and one of the two is kept.

        Args:
            key: of the export.
            report: told if another process or thread is making it.
        """
        lock = self._lock(key)
        try:
            try:
                lock.acquire(blocking=False)
            except TimeoutError:
                report("somebody else is making the same export: waiting for it")
                lock.acquire()
        except OSError as error:
            _log.debug("%s cannot be locked: %s", lock.lock_file, error)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator["Unfinished"]:
        """Make an empty folder to write an export in, while `making` it. What is not kept is removed.

        Raises:
            OSError: the cache cannot be written to.
        """
        folder = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{key}-", dir=self._path("")))
        try:
            yield Unfinished(folder, self, key)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what processes that are gone left half written."""
        for path in self._path("").glob(f"{_UNFINISHED}*"):
            lock = self._lock(path.name.split("-")[1])
            try:
                with lock.acquire(blocking=False):
                    shutil.rmtree(path, ignore_errors=True)
            except TimeoutError:
                continue
            except OSError:
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_S:
                        shutil.rmtree(path)

    def _is_trusted(self) -> bool:
        """Whether nobody else can have put anything into the folder: what is in it is run.

        The folder must be this user's or root's, and not open to everybody. Its group is the operator's choice.
        """
        try:
            status = self._path("").stat()
        except OSError:
            return False
        if status.st_uid in {os.geteuid(), 0} and not status.st_mode & stat.S_IWOTH:
            return True
        _log.warning(
            "the cache %s is not used, as others may write to it: make it this user's own (chown) and close it to "
            "others (chmod o-w), or set server.cache_dir to a folder that is",
            self.folder,
        )
        return False

    def _path(self, name: str) -> Path:
        """A path in the cache; without a folder, one that is nowhere."""
        return (self.folder or Path(os.devnull)) / name

    def _lock(self, key: str) -> "FileLock":
        from filelock import FileLock  # noqa: PLC0415 - most servers make no export

        return FileLock(self._path(f"{key}.lock"))


class Unfinished:
    """An export in the making.

    Attributes:
        folder: exists and is empty.
    """

    def __init__(self, folder: Path, cache: ExportCache, key: str) -> None:
        """Write an export in a folder.

        Args:
            folder: where it is made.
            cache: where it belongs.
            key: of the export.
        """
        self.folder = folder
        self._cache = cache
        self._key = key

    def keep(self, manifest: Manifest) -> tuple[Path, Manifest]:
        """Write the manifest and put the export in its place.

        Returns:
            Where it is now, and the manifest as it is read there: of another process's export if that was faster.

        Raises:
            ExportError: what was written is not what is read.
            OSError: the disk is full, or the place cannot be written to.
        """
        manifest.write(self.folder)
        (self.folder / _SEAL_FILE).write_text(_digest_of_manifest(self.folder), encoding="ascii")
        place = self.folder.with_name(self._key)
        try:
            self.folder.rename(place)
        except OSError:
            found = self._cache.find(self._key)
            if found is not None:
                return found
            # A damaged one was in the way.
            self.folder.rename(place)
        return place, _read_sealed(place)


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
