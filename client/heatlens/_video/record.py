"""What is kept of the answers: the film, the lines of JSON, and the counts."""

import json
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Any

from heatlens._results.results import FrameResult
from heatlens._video.draw import FAILED, Look, draw, look_of
from heatlens._video.lines import Lines
from heatlens._video.sink import Film, open_sink
from heatlens._video.source import Source, VideoFrame


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

    def __init__(self, source: Source, *, film: Path | None, lines: Lines | None, colormap: str, alpha: float) -> None:
        self.counts: Counter[Status] = Counter()
        self._source = source
        self._path = film
        self._film: Film | None = None
        self._lines = lines
        self._style: Any = {"colormap": colormap, "alpha": alpha}
        self._look: Look | None = None

    @property
    def frames(self) -> int:
        """How many frames were answered."""
        return self.counts.total()

    @property
    def codec(self) -> str | None:
        """How the film is encoded; None: there is none."""
        return None if self._film is None else self._film.codec

    def add(self, frame: VideoFrame, answer: FrameResult) -> Status:
        """Keep the answer of the next frame. Raises OSError if it cannot be written."""
        status = status_of(answer)
        if self._lines is not None:
            self._lines.write(json.dumps(as_dict(frame, answer)) + "\n")
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
            assert self._path is not None
            fps = self._source.fps
            self._film = Film(open_sink(self._path, fps=fps, size=self._source.size), fps=fps, steady=self._source.live)
        if answer.result is not None:
            self._look = look_of(answer.result, self._source.size)
        elif status_of(answer) is Status.FAILED:
            self._look = FAILED
        self._film.add(draw(frame.pixels, self._look, **self._style), frame.time_s)


def status_of(answer: FrameResult) -> Status:
    """Return what became of a frame."""
    if answer.skipped:
        return Status.SKIPPED
    if answer.dropped:
        return Status.DROPPED
    return Status.EXPLAINED if answer.error is None else Status.FAILED


def as_dict(frame: VideoFrame, answer: FrameResult) -> dict[str, Any]:
    """Return a frame's answer as it is written in the lines of JSON."""
    result, error = answer.result, answer.error
    return {
        "frame_id": frame.frame_id,
        "time_s": round(frame.time_s, 6),
        "status": status_of(answer).value,
        "classes": [
            {"id": item.class_id, "label": item.label, "probability": item.probability}
            for item in (result.explanations if result is not None else ())
        ],
        "error": None if error is None else {"code": error.code, "reason": error.reason, "message": error.message},
        "latency_ms": round(answer.latency_ms, 3),
        "timing": None if result is None else asdict(result.timing),
    }
