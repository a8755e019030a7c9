"""The lines of JSON: a file that is created with the first line, or stdout."""

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO


class Lines:
    """Writes lines to a file or to stdout, each at once.

    Args:
        path: file to write; what it holds is replaced when the first line comes, not before. None: stdout.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: TextIO | None = None
        self._reader_left = False

    @property
    def reader_left(self) -> bool:
        """Whether who read stdout closed it, as `head` does."""
        return self._reader_left

    def write(self, line: str) -> None:
        """Write a line, which ends in a line break. Raises OSError, which names the file."""
        try:
            if self._file is None:
                self._file = sys.stdout if self._path is None else self._path.open("w", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._reader_left = self._path is None and error.errno == errno.EPIPE
            self._give_up()
            name = "standard output" if self._path is None else str(self._path)
            raise OSError(error.errno, error.strerror, name) from None

    def close(self) -> None:
        """Close the file, not stdout. Idempotent."""
        if self._file is not None and self._path is not None:
            self._file.close()

    def _give_up(self) -> None:
        """Forget what is buffered: closing, at the latest Python's end, would try to write it again, and fail again."""
        if self._path is None:
            # No real file under a test's stdout.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, sys.stdout.fileno())
                os.close(null)
        elif self._file is not None:
            with suppress(OSError):
                self._file.close()
