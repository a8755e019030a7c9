"""StreamExplain refuses: configurations, the order of messages, ids, models. A real server on a real port."""

import math
import threading

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

import tiny_models
from heatlens.v1 import explain_pb2 as pb
from heatlens_server.config import ModelConfig
from messages import distinct
from raw_stream import RawStream, kinds

CONFIG_ERRORS: list[tuple[dict, list[str]]] = [
    ({"max_in_flight": -1}, ["max_in_flight"]),
    ({"overflow_policy": 9}, ["overflow_policy"]),
    ({"explain_every": -1}, ["explain_every"]),
    *(({"max_frames_per_second": rate}, ["max_frames_per_second"]) for rate in (-1.0, math.nan, math.inf, -math.inf)),
    *(({"temporal_smoothing": w}, ["temporal_smoothing"]) for w in (-0.1, 1.0, 0.99999999, 2.0, math.nan, math.inf)),
    *(({"frame_timeout": Duration(seconds=s, nanos=n)}, ["frame_timeout"]) for s, n in ((0, 0), (-1, 0), (0, -5))),
    ({"options": pb.ExplainOptions(top_k=0, map_size=9, layers=["no"])}, ["options.layers[0]", "options.top_k"]),
    (
        {
            "options": pb.ExplainOptions(top_k=99),
            "overflow_policy": 3,
            "max_in_flight": -5,
            "frame_timeout": Duration(),
            "explain_every": -2,
            "max_frames_per_second": math.nan,
            "temporal_smoothing": 1.5,
        },
        [
            "options.top_k",
            "overflow_policy",
            "max_in_flight",
            "frame_timeout",
            "explain_every",
            "max_frames_per_second",
            "temporal_smoothing",
        ],
    ),
]


async def test_a_wrong_configuration_ends_the_stream_and_names_every_field(stub):
    for config, fields in CONFIG_ERRORS:
        stream = RawStream(stub)
        await stream.configure(**config)
        code, details, answers = await stream.failure()
        assert (code, answers) == (grpc.StatusCode.INVALID_ARGUMENT, []), config
        assert set(details.fields) >= {f"config.{field}" for field in fields}
        assert all(field.startswith("config.") for field in details.fields)


@pytest.mark.parametrize("ids", [[1, 2, 2], [-(2**63), 2**63 - 1, 0]])
async def test_ids_that_do_not_increase_end_the_stream_after_its_answers(stub, ids):
    image = distinct(1)[0]
    stream = RawStream(stub)
    await stream.open()
    for frame_id in ids:
        await stream.send(frame_id, image)
    code, details, answers = await stream.failure()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert (details.fields, details.info.reason) == (["frame.frame_id"], "PROTOCOL_VIOLATION")
    assert details.info.metadata["last_frame_id"] == str(ids[-2])
    assert kinds(answers) == [(frame_id, "result") for frame_id in ids[:-1]]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.StreamExplainRequest(), "frame"),
        (pb.StreamExplainRequest(config=pb.StreamConfig()), "config"),
    ],
)
async def test_anything_but_a_frame_ends_the_stream_after_its_answers(stub, request_, field):
    stream = RawStream(stub)
    await stream.open()
    await stream.send(3, distinct(1)[0])
    await stream.write(request_)
    code, details, answers = await stream.failure()
    assert (code, details.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    assert kinds(answers) == [(3, "result")]


async def test_the_configuration_comes_first(stub):
    for first in (None, pb.StreamExplainRequest(), pb.StreamExplainRequest(frame=pb.Frame(frame_id=1))):
        stream = RawStream(stub)
        if first is not None:
            await stream.write(first)
        await stream.call.done_writing()
        code, details, answers = await stream.failure()
        assert (code, details.fields, answers) == (grpc.StatusCode.INVALID_ARGUMENT, ["config"], [])
        assert details.info.reason == "PROTOCOL_VIOLATION"


async def test_models_that_cannot_answer(live, stub, monkeypatch):
    arrived = threading.Event()
    monkeypatch.setattr(tiny_models, "late", arrived.wait, raising=False)
    loading = live.fleet.load(ModelConfig(name="late", source="python:tiny_models:late", engine="torch"))
    for model, code, reason in [
        ("none", grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ("late", grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING"),
        ("broken", grpc.StatusCode.FAILED_PRECONDITION, "MODEL_FAILED"),
    ]:
        stream = RawStream(stub)
        await stream.configure(model=model)
        failed, details, answers = await stream.failure()
        assert (failed, details.info.reason, answers) == (code, reason, [])
    arrived.set()
    await loading
