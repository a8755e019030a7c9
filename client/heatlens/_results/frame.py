"""What a stream answers for one frame."""

from dataclasses import dataclass
from typing import Any

from heatlens._exceptions import HeatlensError
from heatlens._results.results import Result

FRAME_DROPPED = "FRAME_DROPPED"


# eq=False: frames are mostly arrays, and arrays have no truth value.
@dataclass(frozen=True, slots=True, eq=False)
class FrameResult:
    """The answer for one frame of a stream: a result, an error, or left out on purpose.

    Attributes:
        frame_id: the frame's id.
        frame: what was passed to `map` or `send`.
        result: the explanation; None if the frame failed or was left out.
        error: why the frame failed; None if it did not. The stream goes on.
        skipped: whether the frame was left out, as `every` or `max_fps` asked for.
        latency_ms: from when the frame was passed to `send`, or pulled by `map`, to its answer.
    """

    frame_id: int
    frame: Any
    result: Result | None
    error: HeatlensError | None
    skipped: bool
    latency_ms: float

    def __repr__(self) -> str:
        outcome = "skipped" if self.skipped else f"error={self.error!r}" if self.error else f"result={self.result!r}"
        return f"FrameResult({self.frame_id}, {outcome}, latency_ms={self.latency_ms:.1f})"

    @property
    def dropped(self) -> bool:
        """Whether the frame gave way to newer ones (overflow="drop-oldest"). `error` says so too."""
        return self.error is not None and self.error.reason == FRAME_DROPPED
