"""Configurations and the order of messages, without a stream."""

import dataclasses

import pytest
from google.protobuf.duration_pb2 import Duration

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2
from heatlens_server.api.limits import Limits
from heatlens_server.api.plan import ExplainPlan
from heatlens_server.api.stream.protocol import (
    FrameOrder,
    StreamPlan,
    config_of,
    field_of_stream,
    parse_config,
)
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


def parse(**config) -> StreamPlan:
    return parse_config(pb.StreamConfig(**config), MODEL, LIMITS)


def fields(error: pytest.ExceptionInfo[InvalidArgument]) -> list[str]:
    return [violation.field for violation in error.value.violations]


def test_nothing_set_explains_every_frame_and_loses_none():
    assert parse() == StreamPlan(
        explain=ExplainPlan(TopK(1), MapSpec(Method.GRAD_CAM, ("body",), upsample=False), False, "<f4", 0),
        window=6,
        drop_oldest=False,
        frame_timeout_s=None,
        explain_every=1,
        max_frames_per_second=0.0,
        temporal_smoothing=0.0,
    )


def test_everything_set():
    plan = parse(
        options=pb.ExplainOptions(top_k=2),
        overflow_policy=pb.OVERFLOW_POLICY_DROP_OLDEST,
        max_in_flight=5,
        frame_timeout=Duration(seconds=1, nanos=500_000_000),
        explain_every=4,
        max_frames_per_second=12.5,
        temporal_smoothing=0.5,
    )
    assert plan.explain.target == TopK(2)
    assert (plan.window, plan.drop_oldest, plan.frame_timeout_s) == (5, True, 1.5)
    assert (plan.explain_every, plan.max_frames_per_second, plan.temporal_smoothing) == (4, 12.5, 0.5)


@pytest.mark.parametrize(("asked", "window"), [(0, 6), (1, 1), (20, 20), (21, 20), (2**31 - 1, 20)])
def test_window(asked, window):
    assert parse(max_in_flight=asked).window == window


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (Duration(nanos=1), 1e-9),
        (Duration(seconds=365 * 24 * 3600), 365 * 24 * 3600),
        (Duration(seconds=2**63 - 1), None),
        (Duration(seconds=1, nanos=-1), 1 - 1e-9),
    ],
)
def test_timeouts_that_no_thread_can_wait_for_are_none(timeout, seconds):
    assert parse(frame_timeout=timeout).frame_timeout_s == seconds


def test_the_reason_and_the_fields_are_those_of_explain_under_config():
    with pytest.raises(InvalidArgument) as raised:
        parse(options=pb.ExplainOptions(top_k=9, map_type=8), max_in_flight=-1)
    assert fields(raised) == ["config.options.top_k", "config.options.map_type", "config.max_in_flight"]
    assert raised.value.reason == "INVALID_OPTION"


REFERENCE = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=(4,), data=bytes.fromhex("0000803f") * 4)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Task.CLASSIFICATION, {}, ""),
        (Task.MULTI_LABEL, {}, ""),
        (Task.SEGMENTATION, {"return_mask": True}, ""),
        (Task.EMBEDDING, {"reference_embedding": REFERENCE}, ""),
        (Task.DETECTION, {}, "which box of a frame is which"),
        (Task.SEGMENTATION, {"faithfulness": faithfulness_pb2.FaithfulnessOptions()}, "each frame's own map"),
    ],
)
def test_what_recurs_from_frame_to_frame_is_smoothed_unless_it_is_measured(task, options, message):
    model = dataclasses.replace(
        MODEL, capabilities=dataclasses.replace(MODEL.capabilities, task=task, has_options=True)
    )
    config = pb.StreamConfig(options=pb.ExplainOptions(**options), temporal_smoothing=0.5)
    if not message:
        assert parse_config(config, model, LIMITS).temporal_smoothing == 0.5
        return
    with pytest.raises(InvalidArgument, match=message) as raised:
        parse_config(config, model, LIMITS)
    assert fields(raised) == ["config.temporal_smoothing"]
    config.temporal_smoothing = 0
    assert parse_config(config, model, LIMITS).temporal_smoothing == 0


@pytest.mark.parametrize("request_", [None, pb.StreamExplainRequest(), pb.StreamExplainRequest(frame=pb.Frame())])
def test_the_first_message_holds_the_configuration(request_):
    with pytest.raises(InvalidArgument) as raised:
        config_of(request_)
    assert (fields(raised), raised.value.reason) == (["config"], "PROTOCOL_VIOLATION")
    assert config_of(pb.StreamExplainRequest(config=pb.StreamConfig(model="a"))).model == "a"


def frame(frame_id: int) -> pb.StreamExplainRequest:
    return pb.StreamExplainRequest(frame=pb.Frame(frame_id=frame_id))


@pytest.mark.parametrize(
    ("good", "bad"),
    [([], None), ([0], 0), ([1, 2, 3], 2), ([-(2**63)], -(2**63)), ([5], -5), ([-3, 0, 2**63 - 1], 7)],
)
def test_ids_increase(good, bad):
    order = FrameOrder()
    assert [order.check(frame(i)).frame_id for i in good] == good
    if bad is not None:
        with pytest.raises(InvalidArgument) as raised:
            order.check(frame(bad))
        assert fields(raised) == ["frame.frame_id"]
        assert raised.value.metadata == {"frame_id": str(bad), "last_frame_id": str(good[-1])}


@pytest.mark.parametrize(
    ("request_", "field"),
    [(pb.StreamExplainRequest(), "frame"), (pb.StreamExplainRequest(config=pb.StreamConfig()), "config")],
)
def test_later_messages_hold_frames(request_, field):
    with pytest.raises(InvalidArgument) as raised:
        FrameOrder().check(request_)
    assert fields(raised) == [field]


def test_where_fields_lie_in_a_stream():
    assert field_of_stream("image") == "frame.image"
    assert field_of_stream("image.pixels.data") == "frame.image.pixels.data"
    assert field_of_stream("options.map_size") == "config.options.map_size"
