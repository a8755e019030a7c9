"""How a stream goes, once its configuration is known to be valid."""

import math
from dataclasses import dataclass

from heatlens_server.api.checks import Limits, Violations
from heatlens_server.api.plan import Plan, plan_options
from heatlens_server.api.query import OverflowPolicy, ReplacementPolicy, StreamConfig, StreamMessage
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
        ends_when_replaced: whether the stream ends when its model is replaced.
    """

    explain: Plan
    window: int
    drop_oldest: bool
    frame_timeout_s: float | None
    explain_every: int
    max_frames_per_second: float
    temporal_smoothing: float
    ends_when_replaced: bool


def config_of(message: StreamMessage | None) -> StreamConfig:
    """The configuration in a stream's first message.

    Args:
        message: None if the stream ended without one.

    Raises:
        InvalidArgument: it holds something else.
    """
    if not isinstance(message, StreamConfig):
        raise InvalidArgument.of(
            "config", "the first message of a stream must hold the configuration", reason=PROTOCOL_VIOLATION
        )
    return message


def plan_stream(config: StreamConfig, model: ServedModel, limits: Limits) -> StreamPlan:
    """Check every field of a configuration against the model and the limits.

    Raises:
        InvalidArgument: with every wrong field.
    """
    wrong = Violations()
    explain = plan_options(config.options, model, limits, wrong)
    if not isinstance(config.overflow_policy, OverflowPolicy):
        wrong.add("overflow_policy", f"unknown overflow policy {config.overflow_policy}")
    if not isinstance(config.replacement_policy, ReplacementPolicy):
        wrong.add("replacement_policy", f"unknown replacement policy {config.replacement_policy}")
    if config.max_in_flight < 0:
        wrong.add("max_in_flight", f"must be >= 0, 0 for the default; got {config.max_in_flight}")
    timeout_s = config.frame_timeout_s
    if timeout_s is not None and not timeout_s > 0:
        wrong.add("frame_timeout_s", f"must be more than 0; got {timeout_s:g} s")
    if config.explain_every < 0:
        wrong.add("explain_every", f"must be >= 0, 0 for every frame; got {config.explain_every}")
    if not 0 <= config.max_frames_per_second < math.inf:
        wrong.add(
            "max_frames_per_second", f"must be finite and >= 0, 0 for no limit; got {config.max_frames_per_second}"
        )
    _check_smoothing(config, model, wrong)
    wrong.raise_if_any()
    window = config.max_in_flight or _DEFAULT_WINDOW_BATCHES * model.max_batch_size
    return StreamPlan(
        explain=explain,
        window=min(window, limits.max_in_flight),
        drop_oldest=config.overflow_policy is OverflowPolicy.DROP_OLDEST,
        frame_timeout_s=None if timeout_s is None or timeout_s > _LONGEST_TIMEOUT_S else timeout_s,
        explain_every=max(1, config.explain_every),
        max_frames_per_second=config.max_frames_per_second,
        temporal_smoothing=config.temporal_smoothing,
        ends_when_replaced=config.replacement_policy is ReplacementPolicy.END,
    )


def _check_smoothing(config: StreamConfig, model: ServedModel, wrong: Violations) -> None:
    weight = config.temporal_smoothing
    if not 0 <= weight < 1:
        wrong.add("temporal_smoothing", f"must be in [0, 1), 0 for none; got {weight:g}")
    elif weight and not model.capabilities.task.traits.can_smooth_over_frames:
        wrong.add(
            "temporal_smoothing",
            f"maps of {model.capabilities.task} cannot be averaged over frames: nothing says which box of a frame is "
            "which of the one before",
        )
    elif weight and config.options.faithfulness:
        wrong.add(
            "temporal_smoothing",
            "options.faithfulness measures each frame's own map, and what is returned would be an average: ask for one "
            "of the two",
        )
