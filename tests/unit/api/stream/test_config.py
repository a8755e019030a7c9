"""Configurations, without a stream."""

import dataclasses

import pytest

from heatlens_server.api.checks import Limits
from heatlens_server.api.plan import Plan
from heatlens_server.api.query import (
    EmptyMessage,
    Frame,
    Options,
    OverflowPolicy,
    ReplacementPolicy,
    StreamConfig,
    Tensor,
)
from heatlens_server.api.stream.config import StreamPlan, config_of, plan_stream
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import InvalidArgument
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.targets import TopK
from heatlens_server.core.tasks import Task
from heatlens_server.fleet.served_model import ServedModel

LIMITS = Limits(
    max_message_bytes=1, max_image_pixels=1, max_queue_length=1, max_targets=4, max_streams=1, max_in_flight=20
)
MODEL = ServedModel(
    name="m",
    version="7",
    labels=(),
    preprocess=PreprocessSpec(4, (4, 4), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), Interpolation.BILINEAR),
    capabilities=Capabilities("torch", "cpu", "fp32", 4, 4, 4, (Method.GRAD_CAM,), ("body",)),
    default_method=Method.GRAD_CAM,
    max_batch_size=3,
    max_delay_s=0.0,
    queue=None,  # parsing never touches it
)


def plan(**config) -> StreamPlan:
    return plan_stream(StreamConfig(**config), MODEL, LIMITS)


def fields(error: pytest.ExceptionInfo[InvalidArgument]) -> list[str]:
    return [violation.field for violation in error.value.violations]


def test_nothing_set_explains_every_frame_and_loses_none():
    assert plan() == StreamPlan(
        explain=Plan(TopK(1), MapSpec(Method.GRAD_CAM, ("body",), upsample=False)),
        window=6,
        drop_oldest=False,
        frame_timeout_s=None,
        explain_every=1,
        max_frames_per_second=0.0,
        temporal_smoothing=0.0,
        ends_when_replaced=False,
    )


def test_everything_set():
    made = plan(
        options=Options(top_k=2),
        overflow_policy=OverflowPolicy.DROP_OLDEST,
        max_in_flight=5,
        frame_timeout_s=1.5,
        explain_every=4,
        max_frames_per_second=12.5,
        temporal_smoothing=0.5,
        replacement_policy=ReplacementPolicy.END,
    )
    assert made.ends_when_replaced
    assert made.explain.target == TopK(2)
    assert (made.window, made.drop_oldest, made.frame_timeout_s) == (5, True, 1.5)
    assert (made.explain_every, made.max_frames_per_second, made.temporal_smoothing) == (4, 12.5, 0.5)


@pytest.mark.parametrize(("asked", "window"), [(0, 6), (1, 1), (20, 20), (21, 20), (2**31 - 1, 20)])
def test_window(asked, window):
    assert plan(max_in_flight=asked).window == window


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (1e-9, 1e-9),
        (365 * 24 * 3600, 365 * 24 * 3600),
        (2.0**63, None),
    ],
)
def test_timeouts_that_no_thread_can_wait_for_are_none(timeout, seconds):
    assert plan(frame_timeout_s=timeout).frame_timeout_s == seconds


def test_options_and_the_rest_are_checked_at_once():
    with pytest.raises(InvalidArgument) as raised:
        plan(options=Options(top_k=9, map_type=8), max_in_flight=-1)
    assert fields(raised) == ["top_k", "map_type", "max_in_flight"]
    assert raised.value.reason == "INVALID_OPTION"


REFERENCE = Tensor("FLOAT32", (4,), bytes.fromhex("0000803f") * 4)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Task.CLASSIFICATION, {}, ""),
        (Task.MULTI_LABEL, {}, ""),
        (Task.SEGMENTATION, {"return_mask": True}, ""),
        (Task.EMBEDDING, {"reference_embedding": REFERENCE}, ""),
        (Task.DETECTION, {}, "which box of a frame is which"),
        (Task.SEGMENTATION, {"faithfulness": True}, "each frame's own map"),
    ],
)
def test_what_recurs_from_frame_to_frame_is_smoothed_unless_it_is_measured(task, options, message):
    model = dataclasses.replace(
        MODEL, capabilities=dataclasses.replace(MODEL.capabilities, task=task, has_options=True)
    )
    config = StreamConfig(options=Options(**options), temporal_smoothing=0.5)
    if not message:
        assert plan_stream(config, model, LIMITS).temporal_smoothing == 0.5
        return
    with pytest.raises(InvalidArgument, match=message) as raised:
        plan_stream(config, model, LIMITS)
    assert fields(raised) == ["temporal_smoothing"]
    config = dataclasses.replace(config, temporal_smoothing=0.0)
    assert plan_stream(config, model, LIMITS).temporal_smoothing == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"overflow_policy": 7}, "overflow_policy"),
        ({"replacement_policy": 7}, "replacement_policy"),
        ({"max_in_flight": -1}, "max_in_flight"),
        ({"frame_timeout_s": 0.0}, "frame_timeout_s"),
        ({"frame_timeout_s": -1.0}, "frame_timeout_s"),
        ({"explain_every": -1}, "explain_every"),
        ({"max_frames_per_second": -0.5}, "max_frames_per_second"),
        ({"max_frames_per_second": float("inf")}, "max_frames_per_second"),
        ({"max_frames_per_second": float("nan")}, "max_frames_per_second"),
        ({"temporal_smoothing": 1.0}, "temporal_smoothing"),
        ({"temporal_smoothing": float("nan")}, "temporal_smoothing"),
    ],
)
def test_each_wrong_field_is_named(changes, field):
    with pytest.raises(InvalidArgument) as raised:
        plan(**changes)
    assert fields(raised) == [field]


@pytest.mark.parametrize("message", [None, EmptyMessage(), Frame(1)])
def test_the_first_message_holds_the_configuration(message):
    with pytest.raises(InvalidArgument) as raised:
        config_of(message)
    assert (fields(raised), raised.value.reason) == (["config"], "PROTOCOL_VIOLATION")
    assert config_of(StreamConfig(model="a")).model == "a"
