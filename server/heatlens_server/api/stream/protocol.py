"""What a stream may say: the configuration first, then frames whose ids increase. No input or output in here."""

import math
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration

from heatlens.v1 import explain_pb2 as pb
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.api.tasks.table import task_wire
from heatlens_server.api.validation import parse_options
from heatlens_server.api.violations import Violations
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.fleet.served_model import ServedModel

PROTOCOL_VIOLATION = "PROTOCOL_VIOLATION"
"""Reason of the errors that end a stream because of the order of its messages."""

_DEFAULT_WINDOW_BATCHES = 2
"""One batch runs while the next one gathers."""

_LONGEST_TIMEOUT_S = 365 * 24 * 3600
"""A frame_timeout beyond this is none: threads cannot wait for any number of seconds."""


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """A valid configuration.

    Attributes:
        explain: how to explain each frame.
        window: largest number of unanswered frames, >= 1.
        drop_oldest: True to lose frames rather than to be late.
        frame_timeout_s: how long a frame may wait to be run, in seconds; None for ever.
        explain_every: explain the first of so many frames, >= 1.
        max_frames_per_second: explain at most so many; 0 for no limit.
        temporal_smoothing: weight of the past in the maps, in [0, 1).
    """

    explain: ExplainPlan
    window: int
    drop_oldest: bool
    frame_timeout_s: float | None
    explain_every: int
    max_frames_per_second: float
    temporal_smoothing: float


def config_of(request: pb.StreamExplainRequest | None) -> pb.StreamConfig:
    """The configuration in a stream's first message.

    Args:
        request: the message; None if the stream ended without one.

    Raises:
        InvalidArgument: it holds something else.
    """
    if request is None or request.WhichOneof("payload") != "config":
        raise InvalidArgument.of(
            "config", "the first message of a stream must hold the configuration", reason=PROTOCOL_VIOLATION
        )
    return request.config


def parse_config(config: pb.StreamConfig, model: ServedModel, limits: Limits) -> StreamPlan:
    """Check every field of a configuration against the model and the limits.

    Raises:
        InvalidArgument: with every wrong field, as "config.options.top_k".
    """
    wrong = Violations()
    explain = parse_options(config.options, model, limits, wrong)
    if config.overflow_policy not in pb.OverflowPolicy.values():
        wrong.add("overflow_policy", f"unknown overflow policy {config.overflow_policy}")
    if config.max_in_flight < 0:
        wrong.add("max_in_flight", f"must be >= 0, 0 for the default; got {config.max_in_flight}")
    timeout_s = _frame_timeout_s(config, wrong)
    if config.explain_every < 0:
        wrong.add("explain_every", f"must be >= 0, 0 for every frame; got {config.explain_every}")
    if not 0 <= config.max_frames_per_second < math.inf:
        wrong.add(
            "max_frames_per_second", f"must be finite and >= 0, 0 for no limit; got {config.max_frames_per_second}"
        )
    _check_smoothing(config, model, wrong)
    try:
        wrong.raise_if_any()
    except InvalidArgument as error:
        raise error.within("config.{}".format) from None
    window = config.max_in_flight or _DEFAULT_WINDOW_BATCHES * model.max_batch_size
    return StreamPlan(
        explain=explain,
        window=min(window, limits.max_in_flight),
        drop_oldest=config.overflow_policy == pb.OVERFLOW_POLICY_DROP_OLDEST,
        frame_timeout_s=timeout_s,
        explain_every=max(1, config.explain_every),
        max_frames_per_second=config.max_frames_per_second,
        temporal_smoothing=config.temporal_smoothing,
    )


def field_of_stream(field: str) -> str:
    """Where a field that is wrong for one frame lies in a stream: the image came with the frame, the options before."""
    return f"frame.{field}" if field.partition(".")[0] == "image" else f"config.{field}"


class FrameOrder:
    """Checks the messages after the first, in order."""

    def __init__(self) -> None:
        """No frame so far."""
        self._last_id: int | None = None

    def check(self, request: pb.StreamExplainRequest) -> pb.Frame:
        """The frame in a message.

        Raises:
            InvalidArgument: it holds no frame, or one whose id does not increase.
        """
        if request.WhichOneof("payload") != "frame":
            field = "config" if request.HasField("config") else "frame"
            raise InvalidArgument.of(
                field, "every message of a stream but the first must hold a frame", reason=PROTOCOL_VIOLATION
            )
        frame_id = request.frame.frame_id
        if self._last_id is not None and frame_id <= self._last_id:
            raise InvalidArgument.of(
                "frame.frame_id",
                f"must increase from frame to frame; got {frame_id} after {self._last_id}",
                reason=PROTOCOL_VIOLATION,
                frame_id=frame_id,
                last_frame_id=self._last_id,
            )
        self._last_id = frame_id
        return request.frame


def _check_smoothing(config: pb.StreamConfig, model: ServedModel, wrong: Violations) -> None:
    weight = config.temporal_smoothing
    if not 0 <= weight < 1:
        wrong.add("temporal_smoothing", f"must be in [0, 1), 0 for none; got {weight:g}")
    elif weight and not task_wire(model.capabilities.task).recurs:
        wrong.add(
            "temporal_smoothing",
            f"maps of {model.capabilities.task} cannot be averaged over frames: nothing says which box of a frame is "
            "which of the one before",
        )
    elif weight and config.options.HasField("faithfulness"):
        wrong.add(
            "temporal_smoothing",
            "options.faithfulness measures each frame's own map, and what is returned would be an average: ask for one "
            "of the two",
        )


def _frame_timeout_s(config: pb.StreamConfig, wrong: Violations) -> float | None:
    if not config.HasField("frame_timeout"):
        return None
    seconds = _seconds(config.frame_timeout)
    if not seconds > 0:
        wrong.add("frame_timeout", f"must be more than 0; got {seconds:g} s")
    return seconds if seconds <= _LONGEST_TIMEOUT_S else None


def _seconds(duration: Duration) -> float:
    """In seconds, whatever its parts are: protobuf's own conversion refuses what lies outside of its range."""
    return duration.seconds + duration.nanos / 1e9
