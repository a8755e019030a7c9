"""Streams against a scripted server, through both clients: order, pairing, windows, frames that fail."""

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta, timezone

import cv2
import numpy as np
import pytest

import heatlens
from heatlens import HeatlensError, InvalidArgumentError
from heatlens.v1 import explain_pb2
from stream_peer import BAD, frame_status, reply_to

FRAMES = [bytes([i]) for i in range(40)]


async def collected(answers):
    return [item async for item in answers]


async def settled(condition, timeout_s=5.0):
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is another thread's
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(coroutine):
    """A task that is still running after a moment, and cancelled at the end if it is then."""
    task = asyncio.create_task(coroutine)
    done, _ = await asyncio.wait({task}, timeout=0.1)
    assert not done, "it should wait"
    try:
        yield task
    finally:
        task.cancel()


async def test_one_answer_for_each_frame_in_order_with_the_frame_itself(connect, peer):
    async with connect().stream() as stream:
        items = await collected(stream.map(FRAMES))
    assert [item.frame_id for item in items] == list(range(40))
    assert all(item.frame is frame for item, frame in zip(items, FRAMES, strict=True))
    assert [item.result.explanations[0].logit for item in items] == list(range(40))
    assert all(item.error is None and not item.skipped and not item.dropped for item in items)
    assert all(0 < item.latency_ms < 10_000 for item in items)
    assert peer.streams.statuses == ["finished"], "a stream that has nothing to do is not cancelled"


async def test_the_configuration_is_what_was_asked_for(connect, peer):
    options = {
        "model": "tiny", "max_in_flight": 3, "overflow": "drop-oldest", "every": 2, "max_fps": 12.5, "smooth": 0.75,
        "frame_timeout": 0.25, "top_k": 2, "method": "grad-cam", "layers": "body", "map_size": "source",
        "map_type": "uint8", "top_predictions": 3,
    }  # fmt: skip
    async with connect().stream(**options) as stream:
        assert (stream.window, stream.model, stream.model_version) == (3, "tiny", "7")
        assert stream.last_frame_id is None
    (config,) = peer.streams.configs
    assert config == explain_pb2.StreamConfig(
        model="tiny",
        max_in_flight=3,
        overflow_policy=explain_pb2.OVERFLOW_POLICY_DROP_OLDEST,
        explain_every=2,
        max_frames_per_second=12.5,
        temporal_smoothing=0.75,
        frame_timeout={"nanos": 250_000_000},
        options=explain_pb2.ExplainOptions(
            top_k=2,
            method=explain_pb2.METHOD_GRAD_CAM,
            layers=["body"],
            map_size=explain_pb2.MAP_SIZE_SOURCE,
            map_type=explain_pb2.DATA_TYPE_UINT8,
            top_predictions=3,
        ),
    )


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("max_in_flight", [0, -1, 1.5, "4", True, 2**31, NAN]),
        ("overflow", ["drop", "", None, 1, "BLOCK"]),
        ("every", [0, -1, 1.0, None, True, NAN, 2**31]),
        ("max_fps", [0, -1, NAN, INF, "30", True, 10**400]),
        ("smooth", [1, 1.0, -0.1, NAN, INF, None, "0.5", 1 - 1e-9, 10**400, True]),
        ("frame_timeout", [0, -1, NAN, INF, 2e9, "1", True]),
        ("jpeg_quality", [0, 101, 90.0, True, NAN, "90"]),
        ("top_k", [0, NAN]),
        ("method", ["nope"]),
        ("map_size", ["huge"]),
        ("model", [3]),
    ],
)
async def test_wrong_arguments_are_named_before_the_call(connect, peer, argument, values):
    client = connect()
    for value in values:
        with pytest.raises(InvalidArgumentError) as caught:
            client.stream(**{argument: value})
        assert caught.value.field_violations[0].field == argument, value
    assert peer.streams.configs == []


async def test_the_shortest_timeout_is_not_none(connect, peer):
    async with connect().stream(frame_timeout=1e-12):
        assert peer.streams.configs[0].frame_timeout.nanos == 1


async def test_frames_left_out_travel_without_their_image(connect, peer):
    async with connect().stream(every=3) as stream:
        items = await collected(stream.map(FRAMES[:8]))
    assert [item.skipped for item in items] == [False, True, True] * 2 + [False, True]
    assert [frame.HasField("image") for frame in peer.streams.frames] == [not item.skipped for item in items]
    assert items[1].result is items[1].error is None
    assert items[1].frame is FRAMES[1]


async def test_a_frame_left_out_is_not_even_looked_at(connect, peer):
    async with connect().stream(every=2) as stream:
        items = await collected(stream.map([b"a", "no such file", b"b", None]))
    assert [item.skipped for item in items] == [False, True, False, True]


async def test_pixels_travel_as_they_are_or_as_jpeg(connect, peer):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:] = (200, 100, 10)
    client = connect()
    async with client.stream() as raw, client.stream(jpeg_quality=95) as jpeg:
        await collected(raw.map([pixels[:, ::-1]]))
        await collected(jpeg.map([pixels, b"a file"]))
    first, second, third = (frame.image for frame in peer.streams.frames)
    assert list(first.pixels.shape) == [32, 48, 3]
    assert first.pixels.data == pixels.tobytes()
    assert second.encoded[:2] == b"\xff\xd8"
    decoded = cv2.imdecode(np.frombuffer(second.encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert np.abs(decoded.astype(int) - pixels).max() < 6, "red is still red"
    assert third.encoded == b"a file"


async def test_an_array_of_frames_is_an_iterable_of_frames(connect):
    async with connect().stream() as stream:
        items = await collected(stream.map(np.zeros((3, 4, 4, 3), np.uint8)))
    assert [item.frame.shape for item in items] == [(4, 4, 3)] * 3


@pytest.mark.parametrize("frames", [b"one", "a.jpg", np.zeros((4, 4, 3), np.uint8), 7, None])
async def test_one_frame_is_no_iterable_of_frames(connect, frames):
    async with connect().stream() as stream:
        with pytest.raises(InvalidArgumentError, match="frames"):
            await collected(stream.map(frames))


async def test_frames_that_fail_are_values_in_their_turn(connect, peer, tmp_path):
    frames = [
        b"good",
        BAD,
        np.zeros((4, 4, 3), np.float32),
        tmp_path / "missing.jpg",
        b"",
        b"x" * 2000,
        object(),
        b"good",
    ]
    async with connect(max_message_bytes=1000).stream(max_in_flight=2) as stream:
        items = await collected(stream.map(frames))
        assert [item.frame is frame for item, frame in zip(items, frames, strict=True)] == [True] * 8
        reasons = [item.error and item.error.reason for item in items]
        assert reasons == [
            None, "IMAGE_UNDECODABLE", "INVALID_ARGUMENT", "IMAGE_UNREADABLE", "IMAGE_EMPTY", "MESSAGE_TOO_LARGE",
            "INVALID_ARGUMENT", None,
        ]  # fmt: skip
        assert all(isinstance(item.error, InvalidArgumentError) for item in items[1:-1])
        fields = [item.error.field_violations[0].field for item in items[1:-1]]
        assert fields == ["frame.image.encoded"] + ["frame"] * 5
        assert isinstance(items[3].error.__cause__, FileNotFoundError)
        assert items[1].error.request_id
        assert items[2].error.request_id is None, "it was never sent"
        assert [frame.frame_id for frame in peer.streams.frames] == [0, 1, 7]
        assert (await collected(stream.map([b"more"])))[0].frame_id == 8


async def test_send_raises_for_a_frame_that_cannot_be_sent_and_the_stream_lives(connect, peer, tmp_path):
    async with connect(max_message_bytes=1000).stream() as stream:
        for frame, error in [
            (np.zeros((4, 4)), InvalidArgumentError),
            (b"x" * 2000, InvalidArgumentError),
            (tmp_path / "missing.jpg", FileNotFoundError),
        ]:
            with pytest.raises(error):
                await stream.send(frame)
        assert await stream.send(b"good") == 0
        assert (await stream.receive()).result.explanations[0].class_id == 0


async def test_errors_of_frames_carry_what_errors_of_calls_do(connect, peer):
    def reply(frame, index, config):
        status = frame_status("OUT_OF_MEMORY", code=8, field="frame.image", request_id="of-the-server")
        return explain_pb2.StreamExplainResponse(frame_id=frame.frame_id, error=status)

    peer.streams.reply = reply
    async with connect().stream() as stream:
        (item,) = await collected(stream.map([b"x"]))
    assert isinstance(item.error, heatlens.ResourceExhaustedError)
    assert (item.error.message, item.error.reason) == ("no: OUT_OF_MEMORY", "OUT_OF_MEMORY")
    assert (item.error.request_id, item.error.last_frame_id) == ("of-the-server", None)
    assert not item.dropped


async def test_a_result_that_breaks_the_contract_is_that_frames_error(connect, peer):
    def reply(frame, index, config):
        answer = reply_to(frame, index, config)
        if index == 1:
            answer.result.explanations[0].map.shape[0] = 7
        return answer

    peer.streams.reply = reply
    async with connect().stream() as stream:
        items = await collected(stream.map(FRAMES[:3]))
    assert [item.error and item.error.reason for item in items] == [None, "INVALID_RESPONSE", None]


async def test_placed_maps_are_known_as_such(connect, peer):
    async with connect().stream(map_size="source") as stream:
        (item,) = await collected(stream.map([b"x"]))
    assert item.result.explanations[0].heatmap.placed


# Windows.


async def test_block_send_waits_while_the_window_is_full(connect, peer):
    script = peer.streams
    script.gate.clear()
    async with connect().stream(max_in_flight=2) as stream:
        for frame in FRAMES[:2]:
            await stream.send(frame)
        async with running(stream.send(FRAMES[2])) as third:
            script.permits.release()
            assert await asyncio.wait_for(third, 5) == 2
        assert (await stream.receive()).frame is FRAMES[0]
        assert stream.last_frame_id == 0
        script.gate.set()


async def test_the_window_in_force_is_the_servers(connect, peer):
    peer.streams.window = 1
    peer.streams.gate.clear()
    async with connect().stream(max_in_flight=30) as stream:
        assert stream.window == 1
        await stream.send(b"x")
        async with running(stream.send(b"y")):
            peer.streams.gate.set()


@pytest.mark.parametrize("window", [1, 3])
async def test_map_never_pulls_more_than_the_window_ahead_of_its_loop(connect, peer, window):
    pulled = []

    def frames():
        for frame in FRAMES:
            pulled.append(frame)
            yield frame

    consumed = 0
    async with connect().stream(max_in_flight=window) as stream:
        async for _ in stream.map(frames()):
            consumed += 1
            if consumed in {1, 5}:
                # Time enough to pull them all.
                await asyncio.sleep(0.05)
            assert len(pulled) <= consumed + window
    assert consumed == len(FRAMES)


async def test_drop_oldest_send_never_waits_for_the_server(connect, peer):
    script = peer.streams
    script.gate.clear()
    async with connect().stream(max_in_flight=2, overflow="drop-oldest") as stream:
        async with asyncio.timeout(5):
            ids = [await stream.send(frame) for frame in FRAMES]
        await settled(lambda: len(script.frames) == 4)
        script.gate.set()
        await stream.finish()
        items = await collected(stream)
    assert [item.frame_id for item in items] == ids
    assert [item.frame_id for item in items if not item.dropped] == [0, 1, 2, 3, 39]
    dropped = items[20]
    assert isinstance(dropped.error, heatlens.ResourceExhaustedError)
    assert (dropped.error.reason, dropped.frame) == ("FRAME_DROPPED", FRAMES[20])
    assert [frame.frame_id for frame in script.frames] == [0, 1, 2, 3, 39]


async def test_drop_oldest_map_reads_the_camera_whatever_the_loop_does(connect, peer):
    pulled = []

    def frames():
        for frame in FRAMES:
            pulled.append(frame)
            yield frame

    async with connect().stream(max_in_flight=1, overflow="drop-oldest") as stream:
        answers = stream.map(frames())
        items = [await anext(answers)]
        await settled(lambda: len(pulled) == len(FRAMES))
        items += await collected(answers)
    assert [item.frame_id for item in items] == list(range(len(FRAMES)))
    assert items[-1].result is not None, "the newest is explained"
    assert sum(item.dropped for item in items) > 20


async def test_every_counts_what_reaches_the_server_whatever_is_dropped(connect, peer):
    script = peer.streams
    script.gate.clear()
    async with connect().stream(max_in_flight=1, overflow="drop-oldest", every=3) as stream:
        for frame in FRAMES[:10]:
            await stream.send(frame)
        await settled(lambda: len(script.frames) == 2)
        script.gate.set()
        items = [await stream.receive() for _ in range(10)]
        for frame in FRAMES[10:14]:
            await stream.send(frame)
            items.append(await stream.receive())
    assert [frame.frame_id for frame in script.frames] == [0, 1, 9, 10, 11, 12, 13]
    assert [frame.HasField("image") for frame in script.frames] == [i % 3 == 0 for i in range(7)]
    assert [item.frame_id for item in items if item.skipped] == [1, 9, 11, 12]


# Sending one by one.


async def test_send_and_receive_from_two_tasks(connect):
    async with connect().stream(max_in_flight=2) as stream:

        async def produce():
            for frame in FRAMES:
                await stream.send(frame)
            await stream.finish()

        producer = asyncio.create_task(produce())
        items = await collected(stream)
        await producer
    assert [item.frame for item in items] == FRAMES


async def test_many_senders_at_once_are_put_in_order(connect, peer):
    async with connect().stream(max_in_flight=2) as stream:
        sending = [asyncio.create_task(stream.send(frame)) for frame in FRAMES]
        items = [await stream.receive() for _ in FRAMES]
        ids = await asyncio.gather(*sending)
    assert sorted(ids) == [item.frame_id for item in items] == list(range(40))
    assert all(items[frame_id].frame is frame for frame_id, frame in zip(ids, FRAMES, strict=True))


async def test_ids_are_the_callers_if_he_wants(connect, peer):
    async with connect().stream() as stream:
        assert await stream.send(b"a", frame_id=10) == 10
        assert await stream.send(b"b") == 11
        for wrong in (11, 3, "12"):
            with pytest.raises(InvalidArgumentError, match="frame_id"):
                await stream.send(b"c", frame_id=wrong)
        assert [(await stream.receive()).frame_id for _ in range(2)] == [10, 11]


async def test_capture_times(connect, peer):
    moment = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone(timedelta(hours=2)))
    async with connect().stream() as stream:
        for time in (moment, moment.timestamp(), 0, -0.25, None):
            await stream.send(b"x", capture_time=time)
            await stream.receive()
        for wrong in (datetime(2026, 1, 1), "now", NAN, INF, 1e12, -1e12, 10**400, True):  # noqa: DTZ001
            with pytest.raises(InvalidArgumentError, match="capture_time"):
                await stream.send(b"x", capture_time=wrong)
        await collected(stream.map([b"x"]))
    times = [frame.capture_time for frame in peer.streams.frames]
    assert times[0].ToDatetime(tzinfo=UTC) == moment
    assert abs(times[1].ToNanoseconds() - times[0].ToNanoseconds()) < 1000
    assert [times[2].ToNanoseconds(), times[3].ToNanoseconds()] == [0, -250_000_000]
    assert not peer.streams.frames[4].HasField("capture_time")
    assert abs(times[5].ToDatetime(tzinfo=UTC) - datetime.now(UTC)) < timedelta(seconds=30)


async def test_finish_then_the_rest_then_the_end(connect, peer):
    peer.streams.gate.clear()
    async with connect().stream() as stream:
        await stream.send(b"a")
        await stream.finish()
        await stream.finish()
        with pytest.raises(heatlens.FailedPreconditionError) as caught:
            await stream.send(b"b")
        assert caught.value.reason == "STREAM_FINISHED"
        peer.streams.gate.set()
        assert [item.frame_id async for item in stream] == [0]
        with pytest.raises(heatlens.FailedPreconditionError, match="every answer was received"):
            await stream.receive()
    assert peer.streams.statuses == ["finished"]


async def test_finish_wakes_a_sender_that_waits(connect, peer):
    peer.streams.gate.clear()
    async with connect().stream(max_in_flight=1) as stream:
        await stream.send(b"a")
        async with running(stream.send(b"b")) as second:
            await stream.finish()
            with pytest.raises(heatlens.FailedPreconditionError):
                await asyncio.wait_for(second, 5)
        peer.streams.gate.set()
        assert [item.frame_id async for item in stream] == [0]


async def test_one_use_at_a_time(connect, peer):
    async with connect().stream() as stream:
        await stream.send(b"a")
        with pytest.raises(heatlens.FailedPreconditionError, match="wait for `receive`"):
            await collected(stream.map(FRAMES))
        await stream.receive()
        answers = stream.map(FRAMES)
        await anext(answers)
        for call in (stream.send(b"b"), stream.receive(), anext(stream.map(FRAMES))):
            with pytest.raises(heatlens.FailedPreconditionError) as caught:
                await call
            assert caught.value.reason == "STREAM_BUSY"
        assert len(await collected(answers)) == len(FRAMES) - 1


async def test_the_first_use_opens_the_stream(connect, peer):
    stream = connect().stream()
    with pytest.raises(heatlens.FailedPreconditionError, match="not open"):
        _ = stream.window
    assert peer.streams.configs == []
    try:
        assert await stream.send(b"a") == 0
        assert stream.window == 4
    finally:
        await stream.close()


def test_representations():
    with heatlens.Client("localhost:1") as client:
        assert repr(client.stream()) == "Stream(not open)"
        stream = client.stream()
        stream.close()
        assert repr(stream) == "Stream(closed)"
    assert repr(heatlens.AsyncClient("localhost:1").stream()) == "AsyncStream(not open)"
    assert HeatlensError("x").last_frame_id is None
