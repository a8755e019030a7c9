"""Packages that not every server has: which `pip install 'heatlens[EXTRA]'` adds them, told where one is missing."""

import contextlib
import importlib.util
import threading
from collections.abc import Iterator

from heatlens_server.core.errors import ModelLoadError

_OWN = frozenset({"heatlens", "heatlens_server"})

importing = threading.RLock()
"""To be held while torch, or what builds on it, is imported.

Models are loaded side by side, and a model's torch engine when a request first needs it. Where two threads import
packages whose modules import each other, as torchvision's do, Python may show one of them half a module.
"""


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


@contextlib.contextmanager
def brought_by(extra: str) -> Iterator[None]:
    """To be put around imports of what an extra brings.

    Raises:
        ModelLoadError: a package is missing; names it and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        # A module of our own that is missing is a fault of ours.
        if package in _OWN:
            raise
        raise ModelLoadError(
            f"this needs {package}, which is not installed: pip install 'heatlens[{extra}]'"
        ) from error
