"""What is kept of the answers: the film, the lines of JSON, and the counts."""

import errno
import json
import os
import sys
from collections import Counter
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from heatlens._results.answer_json import answer_json
from heatlens._results.results import FrameResult
from heatlens._video.draw import FAILED, Annotation, annotation_of, draw
from heatlens._video.source import Source, VideoFrame

if TYPE_CHECKING:
    from heatlens._video.film import Film


class JsonLines:
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
        """Whether the reader of stdout closed it, as `head` does."""
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
        """Drop what is buffered: closing, at the latest at Python's end, would try to write it again."""
        if self._path is None:
            # No real file under a test's stdout.
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, sys.stdout.fileno())
                os.close(null)
        elif self._file is not None:
            with suppress(OSError):
                self._file.close()


class Status(StrEnum):
    """What became of a frame."""

    EXPLAINED = "explained"
    SKIPPED = "skipped"
    DROPPED = "dropped"
    FAILED = "failed"


class Record:
    """Keeps every answer, in frame order.

    A frame that was skipped or dropped is drawn with the last answer: a film whose maps come and go is hard to watch.
    One that failed is drawn plain, and so are those after it until the next answer.

    Args:
        source: where the frames come from.
        film: file to write, created with the first answer. None: no film.
        lines: where to write one JSON object per frame. None: nowhere.
        colormap: name of an OpenCV colour map.
        alpha: opacity of the map, in [0, 1].
    """

    def __init__(
        self, source: Source, *, film: Path | None, lines: JsonLines | None, colormap: str, alpha: float
    ) -> None:
        self.counts: Counter[Status] = Counter()
        self._source = source
        self._path = film
        self._film: Film | None = None
        self._lines = lines
        self._style: Any = {"colormap": colormap, "alpha": alpha}
        self._annotation: Annotation | None = None

    @property
    def frames(self) -> int:
        """How many frames were answered."""
        return self.counts.total()

    @property
    def has_film(self) -> bool:
        """Whether there is a film."""
        return self._film is not None

    def add(self, frame: VideoFrame, answer: FrameResult) -> Status:
        """Keep the answer of the next frame. Raises OSError if it cannot be written."""
        status = status_of(answer)
        if self._lines is not None:
            told = answer_json(
                answer.result,
                status=status.value,
                frame_id=frame.frame_id,
                time_s=frame.time_s,
                error=answer.error,
                latency_ms=answer.latency_ms,
            )
            self._lines.write(json.dumps(told) + "\n")
        if self._path is not None:
            self._draw(frame, answer)
        self.counts[status] += 1
        return status

    def close(self) -> None:
        """Finish the film. Idempotent. Raises OSError."""
        if self._film is not None:
            self._film.close()

    def _draw(self, frame: VideoFrame, answer: FrameResult) -> None:
        if self._film is None:
            from heatlens._video.film import Film  # noqa: PLC0415 - an extra

            assert self._path is not None
            source = self._source
            self._film = Film(self._path, fps=source.fps, size=source.size, steady=source.live)
        if answer.result is not None:
            self._annotation = annotation_of(answer.result, self._source.size)
        elif status_of(answer) is Status.FAILED:
            self._annotation = FAILED
        self._film.add(draw(frame.pixels, self._annotation, **self._style), frame.time_s)


def status_of(answer: FrameResult) -> Status:
    """Return what became of a frame."""
    if answer.skipped:
        return Status.SKIPPED
    if answer.dropped:
        return Status.DROPPED
    return Status.EXPLAINED if answer.error is None else Status.FAILED
