"""From requests to queries: every enum value has one counterpart, unknown numbers stay, fields have their paths."""

import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import faithfulness_pb2, method_pb2
from heatlens_server.api.query import (
    EmptyMessage,
    Frame,
    Image,
    MapSize,
    MapType,
    Options,
    OverflowPolicy,
    Query,
    ReplacementPolicy,
    StreamConfig,
    Tensor,
)
from heatlens_server.core.methods import Aggregation, Method, Metric, Score
from heatlens_server.core.targets import ClassIds
from heatlens_server.transports.grpc import requests
from heatlens_server.transports.grpc.requests import (
    MAP_TYPES,
    METHOD_FROM_PROTO,
    METHOD_TO_PROTO,
    data_type_name,
    explain_path,
    query_of,
    stream_message_of,
    stream_path,
)


@pytest.mark.parametrize("method", Method)
def test_every_method_goes_there_and_back(method):
    value = METHOD_TO_PROTO[method]
    assert METHOD_FROM_PROTO[value] is method
    # The rule that the proto states for names in configuration files.
    assert method_pb2.Method.Name(value).removeprefix("METHOD_").lower().replace("_", "-") == method.value


@pytest.mark.parametrize(
    ("table", "wire", "unspecified"),
    [
        (METHOD_FROM_PROTO, method_pb2.Method, False),
        (requests.SCORE_FROM_PROTO, method_pb2.TargetScore, False),
        (requests.AGGREGATION_FROM_PROTO, method_pb2.Aggregation, False),
        (requests.METRIC_FROM_PROTO, faithfulness_pb2.FaithfulnessMetric, False),
        (requests.MAP_SIZES, pb.MapSize, True),
        (requests.OVERFLOW_POLICIES, pb.OverflowPolicy, True),
    ],
)
def test_every_value_of_an_enum_has_its_name(table, wire, unspecified):
    assert set(table) == {number for number in wire.values() if number or unspecified}
    # The unspecified value stands for one of the others.
    assert len(set(table.values())) == len(table) - unspecified


def test_every_data_type_has_its_dtype():
    sizes = {pb.DATA_TYPE_UNSPECIFIED: 4, pb.DATA_TYPE_FLOAT32: 4, pb.DATA_TYPE_FLOAT16: 2, pb.DATA_TYPE_UINT8: 1}
    assert {number: np.dtype(map_type.value).itemsize for number, map_type in MAP_TYPES.items()} == sizes
    assert all(np.dtype(kind.value) == np.dtype(kind.value).newbyteorder("<") for kind in MapType)


@pytest.mark.parametrize(
    ("value", "name"),
    [(0, "UNSPECIFIED"), (1, "FLOAT32"), (2, "FLOAT16"), (3, "UINT8"), (4, "UINT16"), (99, "99"), (-1, "-1")],
)
def test_data_types_are_named_known_or_not(value, name):
    assert data_type_name(value) == name


TENSOR = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(1, 2), data=b"ab")


def test_a_request_that_sets_nothing():
    assert query_of(pb.ExplainRequest()) == Query("", Image(), Options())


def test_a_request_that_sets_everything():
    options = pb.ExplainOptions(
        method=method_pb2.METHOD_LAYER_CAM,
        class_ids=pb.ClassIds(values=[3, 1]),
        layers=["a", "b"],
        map_size=pb.MAP_SIZE_SOURCE,
        map_type=pb.DATA_TYPE_UINT8,
        smoothing=pb.Smoothing(augmentation=True, principal_component=True),
        top_predictions=5,
        target_score=method_pb2.TARGET_SCORE_CONTRAST,
        aggregation=method_pb2.AGGREGATION_MAX,
        faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=[1, 8]),
        mask=TENSOR,
        reference_image=pb.Image(pixels=TENSOR),
        min_score=0.25,
        return_mask=True,
    )
    tensor = Tensor("UINT8", (1, 2), b"ab")
    assert query_of(pb.ExplainRequest(model="m", image=pb.Image(encoded=b""), options=options)) == Query(
        "m",
        Image(encoded=b""),
        Options(
            method=Method.LAYER_CAM,
            class_ids=ClassIds((3, 1)),
            layers=("a", "b"),
            map_size=MapSize.SOURCE,
            map_type=MapType.UINT8,
            augmentation=True,
            principal_component=True,
            top_predictions=5,
            target_score=Score.CONTRAST,
            aggregation=Aggregation.MAX,
            faithfulness=True,
            metrics=(Metric.DELETION, Metric.SPARSENESS),
            mask=tensor,
            reference_image=Image(pixels=tensor),
            min_score=0.25,
            return_mask=True,
        ),
    )
    other = query_of(pb.ExplainRequest(options=pb.ExplainOptions(top_k=0, reference_embedding=TENSOR))).options
    assert other == Options(top_k=0, reference_embedding=tensor)


def leaves(descriptor, path=()):
    """The path of every field of a message that holds no message."""
    for field in descriptor.fields:
        if field.message_type is None:
            yield (*path, field.name)
        else:
            yield from leaves(field.message_type, (*path, field.name))


@pytest.mark.parametrize("path", list(leaves(pb.ExplainOptions.DESCRIPTOR)), ids=".".join)
def test_no_option_is_left_out(path):
    options = pb.ExplainOptions()
    message = options
    for name in path[:-1]:
        message = getattr(message, name)
    before = getattr(message, path[-1])
    if hasattr(before, "append"):
        before.append("a" if path[-1] in {"layers", "labels"} else 99)
    else:
        setattr(message, path[-1], type(before)(99))
    assert query_of(pb.ExplainRequest(options=options)).options != Options()


def test_numbers_that_stand_for_nothing_stay_numbers():
    sent = pb.ExplainOptions(
        method=99,
        map_size=9,
        map_type=-1,
        target_score=9,
        aggregation=-2,
        faithfulness=faithfulness_pb2.FaithfulnessOptions(metrics=[0, 99]),
    )
    options = query_of(pb.ExplainRequest(options=sent)).options
    assert (options.method, options.map_size, options.map_type) == (99, 9, -1)
    assert (options.target_score, options.aggregation, options.metrics) == (9, -2, (0, 99))
    config = stream_message_of(pb.StreamExplainRequest(config=pb.StreamConfig(overflow_policy=7, replacement_policy=9)))
    assert (config.overflow_policy, config.replacement_policy) == (7, 9)


def test_messages_of_a_stream():
    assert stream_message_of(pb.StreamExplainRequest()) == EmptyMessage()
    frame = pb.Frame(frame_id=3, image=pb.Image(encoded=b"x"))
    assert stream_message_of(pb.StreamExplainRequest(frame=frame)) == Frame(3, Image(encoded=b"x"))
    frame.capture_time.FromNanoseconds(1_500_000_000)
    assert stream_message_of(pb.StreamExplainRequest(frame=frame)).captured_s == 1.5
    assert stream_message_of(pb.StreamExplainRequest(config=pb.StreamConfig())) == StreamConfig()
    config = pb.StreamConfig(
        model="m",
        model_version="2",
        options=pb.ExplainOptions(top_k=2),
        overflow_policy=pb.OVERFLOW_POLICY_DROP_OLDEST,
        replacement_policy=pb.REPLACEMENT_POLICY_END,
        max_in_flight=5,
        explain_every=4,
        max_frames_per_second=12.5,
        temporal_smoothing=0.5,
    )
    # Beyond what a duration may be.
    config.frame_timeout.seconds, config.frame_timeout.nanos = 2**63 - 1, -1
    assert stream_message_of(pb.StreamExplainRequest(config=config)) == StreamConfig(
        model="m",
        model_version="2",
        options=Options(top_k=2),
        overflow_policy=OverflowPolicy.DROP_OLDEST,
        replacement_policy=ReplacementPolicy.END,
        max_in_flight=5,
        frame_timeout_s=float(2**63),
        explain_every=4,
        max_frames_per_second=12.5,
        temporal_smoothing=0.5,
    )


@pytest.mark.parametrize(
    ("field", "path", "in_stream"),
    [
        ("", "", ""),
        ("image", "image", "frame.image"),
        ("image.pixels.data", "image.pixels.data", "frame.image.pixels.data"),
        ("layers[1]", "options.layers[1]", "config.options.layers[1]"),
        ("class_ids", "options.class_ids", "config.options.class_ids"),
        ("class_ids.ids[2]", "options.class_ids.values[2]", "config.options.class_ids.values[2]"),
        ("metrics[0]", "options.faithfulness.metrics[0]", "config.options.faithfulness.metrics[0]"),
        ("augmentation", "options.smoothing.augmentation", "config.options.smoothing.augmentation"),
        ("reference_image.encoded", "options.reference_image.encoded", "config.options.reference_image.encoded"),
        ("options", "options", "config.options"),
        ("frame_timeout_s", "frame_timeout", "config.frame_timeout"),
        ("frame_id", "frame_id", "frame.frame_id"),
        ("config", "config", "config"),
        ("frame", "frame", "frame"),
    ],
)
def test_paths(field, path, in_stream):
    assert (explain_path(field), stream_path(field)) == (path, in_stream)
