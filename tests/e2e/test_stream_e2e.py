"""StreamExplain on a real server and a real port: answers, their order, windows, sampling, smoothing."""

import asyncio
import logging

import numpy as np
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import model_pb2, model_pb2_grpc
from in_process_server import DeviceGate, batcher_of, until
from messages import distinct, encoded, map_of, pixels
from raw_stream import RawStream, kinds, status_details


async def unary(stub, image: np.ndarray, **options) -> pb.ExplainResponse:
    return await stub.Explain(pb.ExplainRequest(image=pixels(image), options=pb.ExplainOptions(**options)))


def assert_same(one: pb.ExplainResponse, other: pb.ExplainResponse) -> None:
    assert [e.class_id for e in one.explanations] == [e.class_id for e in other.explanations]
    for left, right in zip(one.explanations, other.explanations, strict=True):
        np.testing.assert_allclose(map_of(left), map_of(right), atol=1e-5)
        assert left.logit == pytest.approx(right.logit, rel=1e-4)


async def send_all(stream: RawStream, images: list[np.ndarray]) -> None:
    for i, image in enumerate(images):
        await stream.send(10 * i, image)


async def test_bad_frames_fail_alone_in_order_and_name_their_fields(stub):
    image = distinct(1)[0]
    sent: list[tuple[object, str, str]] = [
        (image, "", ""),
        (pb.Image(encoded=b"garbage"), "frame.image.encoded", "IMAGE_UNDECODABLE"),
        (None, "frame.image", "IMAGE_MISSING"),
        (encoded(image), "", ""),
        (pb.Image(encoded=encoded(image).encoded[:200]), "frame.image.encoded", "IMAGE_UNDECODABLE"),
        (
            pb.Image(pixels=pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=(2, 2, 3), data=b"1")),
            "frame.image.pixels.data",
            "TENSOR_SIZE_MISMATCH",
        ),
        (np.zeros((400, 400, 3), np.uint8), "frame.image.pixels.shape", "IMAGE_TOO_LARGE"),
        (image, "", ""),
    ]
    stream = RawStream(stub, metadata=[("x-request-id", "mine")])
    await stream.open()
    for i, (frame, _, _) in enumerate(sent):
        await stream.send(i, frame)
    answers = await stream.finish()
    assert kinds(answers) == [(i, "INVALID_ARGUMENT" if field else "result") for i, (_, field, _) in enumerate(sent)]
    for answer, (_, field, reason) in zip(answers, sent, strict=True):
        if field:
            details = status_details(answer)
            assert (details.fields, details.info.reason) == ([field], reason)
            assert details.info.domain == "heatlens"


async def test_our_fault_fails_one_frame_and_tells_nothing(stub, caplog):
    images = distinct(2)
    images.insert(1, np.full((64, 64, 3), 255, np.uint8))
    stream = RawStream(stub, metadata=[("x-request-id", "find-me")])
    await stream.open(model="poisonous")
    for i, image in enumerate(images):
        await stream.send(i + 7, image)
    answers = await stream.finish()
    assert kinds(answers) == [(7, "result"), (8, "INTERNAL"), (9, "result")]
    assert answers[1].error.message == "internal error; request id find-me"
    assert b"secret" not in answers[1].error.SerializeToString()
    (line,) = [record for record in caplog.records if hasattr(record, "frame_id")]
    assert (line.frame_id, line.request_id, line.levelno) == (8, "find-me", logging.ERROR)


async def test_an_answer_that_is_too_large_names_the_option(stub):
    stream = RawStream(stub)
    await stream.open(options=pb.ExplainOptions(top_k=4, map_size=pb.MAP_SIZE_SOURCE))
    await stream.send(1, np.zeros((300, 300, 3), np.uint8))
    await stream.send(2, np.zeros((30, 30, 3), np.uint8))
    large, small = await stream.finish()
    assert status_details(large).fields == ["config.options.map_size"]
    assert list(small.result.explanations[0].map.shape) == [30, 30]


async def test_maps_on_the_source_are_those_of_explain(stub):
    image = np.pad(distinct(1)[0], ((0, 0), (8, 24), (0, 0)))
    stream = RawStream(stub)
    await stream.open(options=pb.ExplainOptions(map_size=pb.MAP_SIZE_SOURCE))
    await stream.send(1, image)
    (answer,) = await stream.finish()
    assert list(answer.result.explanations[0].map.shape) == list(image.shape[:2])
    assert_same(answer.result, await unary(stub, image, map_size=pb.MAP_SIZE_SOURCE))


async def test_a_full_window_stops_the_reading_and_loses_nothing(live, stub, channel):
    images = distinct(12)
    gate = DeviceGate(live)
    await gate.fill()
    stream = RawStream(stub)
    await stream.open(max_in_flight=2, overflow_policy=pb.OVERFLOW_POLICY_BLOCK)
    sending = asyncio.create_task(send_all(stream, images))  # more than the network holds
    await until(lambda: len(batcher_of(live)) == 2)
    for _ in range(5):  # what else it might read, it would have read by now
        await model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
    assert live.streams.counters.frames.created == 2
    gate.open()
    await sending
    assert kinds(await stream.finish()) == [(10 * i, "result") for i in range(12)]


async def test_frames_left_out_are_answered_in_order_and_need_no_image(live, stub):
    image = distinct(1)[0]
    stream = RawStream(stub)
    await stream.open(explain_every=3)
    for i in range(7):
        await stream.send(i, image if i % 3 == 0 else None if i % 3 == 1 else pb.Image(encoded=b"garbage"))
    assert kinds(await stream.finish()) == [(i, "skipped" if i % 3 else "result") for i in range(7)]
    assert live.streams.counters.tickets.created == 3


async def test_frames_per_second_are_counted_on_the_clients_clock(stub):
    image = distinct(1)[0]
    stream = RawStream(stub)
    await stream.open(max_frames_per_second=10)
    for i in range(12):
        await stream.send(i, image, capture_time=Timestamp(seconds=1000, nanos=round(i * 1e9 / 30)))
    assert kinds(await stream.finish()) == [(i, "skipped" if i % 3 else "result") for i in range(12)]


async def test_smoothed_maps_are_the_moving_average_of_raw_maps(stub):
    base = distinct(1)[0].astype(int)
    rng = np.random.default_rng(3)
    images = [np.clip(base + rng.integers(-9, 9, base.shape), 0, 255).astype(np.uint8) for _ in range(6)]
    alone = [await unary(stub, image) for image in images]
    assert len({answer.explanations[0].class_id for answer in alone}) == 1
    stream = RawStream(stub)
    await stream.open(temporal_smoothing=0.75)
    for i, image in enumerate(images):
        await stream.send(i, image)
    average = None
    for one, answer in zip(alone, await stream.finish(), strict=True):
        raw = raw_of(one.explanations[0])
        average = raw if average is None else 0.75 * average + 0.25 * raw
        smoothed = answer.result.explanations[0]
        np.testing.assert_allclose(raw_of(smoothed), average, atol=1e-5 * average.max())
        assert (map_of(smoothed).min(), map_of(smoothed).max()) == (0, 1)


def raw_of(explanation: pb.Explanation) -> np.ndarray:
    return map_of(explanation).astype(np.float64) * explanation.map_scale + explanation.map_offset


async def test_a_stream_is_one_line_with_its_counts(stub, caplog):
    caplog.set_level(logging.INFO, "heatlens.rpc")
    stream = RawStream(stub, metadata=[("x-request-id", "count-me")])
    await stream.open(explain_every=2)
    for i, image in enumerate([*distinct(2), pb.Image(encoded=b"garbage")]):
        await stream.send(i, image)
    assert len(await stream.finish()) == 3
    (line,) = [record for record in caplog.records if getattr(record, "request_id", "") == "count-me"]
    assert (line.levelno, line.code, line.model) == (logging.INFO, "OK", "mlp")
    counts = (line.frames_answered, line.frames_explained, line.frames_dropped, line.frames_skipped, line.frames_failed)
    assert counts == (3, 1, 0, 1, 1)
