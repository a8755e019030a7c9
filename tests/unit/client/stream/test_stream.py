"""Streams against a scripted server, through both clients: order, pairing, what is sent, frames that fail."""

import io
from fractions import Fraction

import cv2
import numpy as np
import pytest
from PIL import Image

import heatlens
from heatlens import InvalidArgumentError
from heatlens.v1 import explain_pb2, method_pb2
from stream_adapters import FRAMES, INF, NAN, collected
from stream_script import BAD, frame_status, reply_to


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
        "map_type": "uint8", "top_predictions": 3, "on_replace": "end",
        "version": "7",
    }  # fmt: skip
    async with connect().stream(**options) as stream:
        assert (stream.window, stream.model, stream.model_version) == (3, "tiny", "7")
        assert stream.last_frame_id is None
    (config,) = peer.streams.configs
    assert config == explain_pb2.StreamConfig(
        model="tiny",
        model_version="7",
        max_in_flight=3,
        overflow_policy=explain_pb2.OVERFLOW_POLICY_DROP_OLDEST,
        replacement_policy=explain_pb2.REPLACEMENT_POLICY_END,
        explain_every=2,
        max_frames_per_second=12.5,
        temporal_smoothing=0.75,
        frame_timeout={"nanos": 250_000_000},
        options=explain_pb2.ExplainOptions(
            top_k=2,
            method=method_pb2.METHOD_GRAD_CAM,
            layers=["body"],
            map_size=explain_pb2.MAP_SIZE_SOURCE,
            map_type=explain_pb2.DATA_TYPE_UINT8,
            top_predictions=3,
        ),
    )


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("max_in_flight", [0, -1, 1.5, "4", True, 2**31, NAN]),
        ("overflow", ["drop", "", None, 1, "BLOCK"]),
        ("on_replace", ["stop", "", None, 1, "END"]),
        ("every", [0, -1, 1.0, None, True, NAN, 2**31]),
        ("max_fps", [0, -1, NAN, INF, "30", True, 10**400]),
        ("smooth", [1, 1.0, -0.1, NAN, INF, None, "0.5", 1 - 1e-9, 10**400, True, np.bool_(False), np.array([0.5])]),
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


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, Fraction])
async def test_any_real_number_is_welcome(connect, peer, kind):
    client = connect(timeout=kind(5), retry=heatlens.Retry(initial_backoff_s=kind(0.5), multiplier=kind(2)))
    options = {"smooth": kind(0.5), "max_fps": kind(30), "frame_timeout": kind(0.25)}
    async with client.stream(**options) as stream:
        await stream.send(b"a", capture_time=kind(1000))
        await stream.receive()
    async with connect(timeout=np.int64(5)).stream(max_fps=np.int8(30), smooth=np.uint8(0)):
        pass
    config, of_ints = peer.streams.configs
    assert (config.temporal_smoothing, config.max_frames_per_second) == (0.5, 30.0)
    assert config.frame_timeout.nanos == 250_000_000
    assert of_ints.max_frames_per_second == 30.0
    assert peer.streams.frames[0].capture_time.seconds == 1000


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


async def test_frames_may_be_files_and_images_of_pillow(connect, peer, pixels):
    async with connect().stream() as stream:
        items = await collected(stream.map([io.BytesIO(b"a file"), Image.fromarray(pixels)]))
    assert [item.error for item in items] == [None, None]
    first, second = (frame.image for frame in peer.streams.frames)
    assert first.encoded == b"a file"
    assert second.pixels.data == pixels.tobytes()


async def test_an_array_of_frames_is_an_iterable_of_frames(connect):
    async with connect().stream() as stream:
        items = await collected(stream.map(np.zeros((3, 4, 4, 3), np.uint8)))
    assert [item.frame.shape for item in items] == [(4, 4, 3)] * 3


@pytest.mark.parametrize("frames", [b"one", "a.jpg", np.zeros((4, 4, 3), np.uint8), io.BytesIO(b"one"), 7, None])
async def test_one_frame_is_no_iterable_of_frames(connect, frames):
    async with connect().stream() as stream:
        with pytest.raises(InvalidArgumentError, match="frames"):
            await collected(stream.map(frames))


async def test_frames_that_fail_are_values_in_their_turn(connect, peer, tmp_path):
    frames = [
        b"good",
        BAD,
        np.zeros((4, 4, 3), np.int64),
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
        assert fields == ["frame"] * 6
        assert isinstance(items[3].error.__cause__, FileNotFoundError)
        assert items[1].error.request_id
        assert items[2].error.request_id is None, "it was never sent"
        assert [frame.frame_id for frame in peer.streams.frames] == [0, 1, 7]
        assert (await collected(stream.map([b"more"])))[0].frame_id == 8


async def test_frames_that_never_reach_the_server_do_not_count_for_every(connect, peer):
    async with connect().stream(every=3) as stream:
        items = await collected(stream.map([b"a", b"", b"b", None, b"", b"c", b"d"]))
    outcomes = "".join("s" if item.skipped else "e" if item.error else "r" for item in items)
    assert outcomes == "rsseers"


async def test_pixels_that_no_jpeg_can_hold_fail_alone(connect):
    frames = [np.zeros((1, 65_501, 3), np.uint8), np.zeros((4, 4, 3), np.uint8)]
    async with connect().stream(jpeg_quality=90) as stream:
        wide, good = await collected(stream.map(frames))
        with pytest.raises(InvalidArgumentError, match="frame: cannot be a JPEG of 65501x1 pixels"):
            await stream.send(frames[0])
    assert isinstance(wide.error, InvalidArgumentError)
    assert good.result is not None


async def test_send_raises_for_a_frame_that_cannot_be_sent_and_the_stream_lives(connect, peer, tmp_path):
    async with connect(max_message_bytes=1000).stream() as stream:
        for frame, error in [
            (np.zeros(4), InvalidArgumentError),
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
