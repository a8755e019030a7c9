"""What is done to the frames of a stream, in order: their ids are checked, some are chosen, their maps are averaged.

No input or output in here: the times come with the frames.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from heatlens_server.api.query import Frame, StreamConfig, StreamMessage
from heatlens_server.api.stream.config import PROTOCOL_VIOLATION
from heatlens_server.core.arrays import Float32Array
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.results import ImageResult

_SLACK_S = 1e-3
"""How much earlier than its turn a frame may be: timestamps are often whole milliseconds."""


class FrameOrder:
    """Checks the messages after the first, in order."""

    def __init__(self) -> None:
        """No frame so far."""
        self._last_id: int | None = None

    def check(self, message: StreamMessage) -> Frame:
        """The frame in a message.

        Raises:
            InvalidArgument: it holds no frame, or one whose id does not increase.
        """
        if not isinstance(message, Frame):
            field = "config" if isinstance(message, StreamConfig) else "frame"
            raise InvalidArgument.of(
                field, "every message of a stream but the first must hold a frame", reason=PROTOCOL_VIOLATION
            )
        if self._last_id is not None and message.frame_id <= self._last_id:
            raise InvalidArgument.of(
                "frame_id",
                f"must increase from frame to frame; got {message.frame_id} after {self._last_id}",
                reason=PROTOCOL_VIOLATION,
                frame_id=message.frame_id,
                last_frame_id=self._last_id,
            )
        self._last_id = message.frame_id
        return message


@dataclass(frozen=True, slots=True)
class FrameTime:
    """When a frame was.

    Attributes:
        read_s: when the server read it, on a monotonic clock, in seconds.
        captured_s: when it was captured, on the client's clock, in seconds; None if the client does not tell.
    """

    read_s: float
    captured_s: float | None = None


class FrameSampler:
    """Chooses the first of every `every` frames, and of those at most so many per second.

    Turns come at even intervals, and the first frame since a turn came takes it: frames that jitter are chosen at the
    right rate on average, and in no second more than the limit and one. A turn that no frame took before the next one
    came is lost.
    """

    def __init__(self, *, every: int = 1, max_per_second: float = 0.0) -> None:
        """Choose among frames.

        Args:
            every: >= 1.
            max_per_second: 0.0 for no limit.
        """
        self._every = every
        self._interval_s = 1.0 / max_per_second if max_per_second else 0.0
        self._slack_s = min(_SLACK_S, self._interval_s / 4)
        self._count = 0
        self._until_turn_s = 0.0
        self._last: FrameTime | None = None

    def allows(self, time: FrameTime) -> bool:
        """Whether the next frame is to be explained. To be asked once per frame, in order."""
        self._until_turn_s -= self._since_last_s(time)
        self._last = time
        first_of_many = self._count % self._every == 0
        self._count += 1
        if not first_of_many or self._until_turn_s > self._slack_s:
            return False
        if self._interval_s:
            self._until_turn_s = self._interval_s - math.fmod(-self._until_turn_s, self._interval_s)
        return True

    def _since_last_s(self, time: FrameTime) -> float:
        if self._last is None:
            return 0.0
        if time.captured_s is None or self._last.captured_s is None:
            return time.read_s - self._last.read_s
        # A clock that is set back, or a clip played backwards: time goes on all the same.
        return abs(time.captured_s - self._last.captured_s)


class MapSmoother:
    """Averages the raw maps of each class: average = weight * average + (1 - weight) * map.

    The averages start anew when the maps' size changes, or the most probable class, where the image as a whole has
    classes. A class that a frame does not explain starts anew the next time: no more maps are kept than one answer
    holds. The one map of an embedding model has class 0.
    """

    def __init__(self, weight: float) -> None:
        """Start without a past.

        Args:
            weight: of the past, in [0, 1).
        """
        self._weight = weight
        self._key: tuple[int, ...] = ()
        self._averages: dict[int, Float32Array] = {}

    def smooth(self, result: ImageResult, *, size_px: tuple[int, int] | None = None) -> ImageResult:
        """The result of the next frame, with the averages for its maps.

        Args:
            result: what the engine said; its class ids are all different.
            size_px: the size that the maps will be brought to, if that is another than theirs.

        Returns:
            The same classes with maps float32 (K, h, w) in [0, 1], stretched anew: map * scale + offset is the average
            of the raw maps. A flat average is all zeros with scale 0. The first frame comes back as it is. All that
            is not the maps stays the frame's own.
        """
        # Pixels and embeddings are not of one class: there are no logits of the image as a whole.
        top = int(np.argmax(result.logits)) if result.logits.size else -1
        key = (top, *result.maps.shape[1:], *(size_px or ()))
        past = self._averages if key == self._key else {}
        self._key = key
        raw = result.maps * result.scales[:, None, None] + result.offsets[:, None, None]
        for k, class_id in enumerate(result.class_ids):
            if class_id in past:
                raw[k] = self._weight * past[class_id] + (1.0 - self._weight) * raw[k]
        self._averages = dict(zip(result.class_ids, raw, strict=True))
        return _stretched(result, raw) if past else result


def _stretched(result: ImageResult, raw: Float32Array) -> ImageResult:
    """The result with raw maps in place of its own, min-max per map."""
    offsets = raw.min(axis=(1, 2))
    scales = raw.max(axis=(1, 2)) - offsets
    # A true division: 1 / scale is infinite for denormal scales.
    maps = (raw - offsets[:, None, None]) / np.where(scales == 0, np.float32(1), scales)[:, None, None]
    return dataclasses.replace(result, maps=maps, scales=scales, offsets=offsets)
