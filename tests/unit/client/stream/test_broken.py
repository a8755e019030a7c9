"""Streams that the server refuses, breaks or gets wrong: what is raised, and where a new one can go on."""

import asyncio
import time

import grpc
import pytest

import heatlens
from heatlens.v1 import explain_pb2
from stream_adapters import FRAMES, collected, settled

# Refused at the door.


@pytest.mark.parametrize(
    ("code", "reason", "error"),
    [
        (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", heatlens.NotFoundError),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", heatlens.InvalidArgumentError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT", heatlens.ResourceExhaustedError),
        (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING", heatlens.UnavailableError),
    ],
)
async def test_a_refused_stream_raises_where_it_opens(connect, peer, code, reason, error):
    peer.streams.refuses = (code, reason)
    client = connect()
    with pytest.raises(error) as caught:
        async with client.stream():
            pytest.fail("it was refused")
    assert caught.value.reason == reason
    assert caught.value.request_id
    stream = client.stream()
    for use in (lambda: stream.send(b"x"), stream.receive, stream.finish, lambda: anext(stream.map(FRAMES))):
        with pytest.raises(error):
            await use()
    await stream.close()


@pytest.mark.serial
async def test_a_server_that_does_not_start_the_stream(connect, peer):
    peer.streams.starts.clear()
    began = time.monotonic()
    with pytest.raises(heatlens.DeadlineExceededError, match=r"within 0\.2 s"):
        async with connect(timeout=0.2).stream():
            pytest.fail("it never started")
    assert 0.15 < time.monotonic() - began < 3
    await settled(lambda: peer.streams.statuses)
    assert peer.streams.statuses == ["cancelled"]


async def test_the_timeout_is_for_the_start_only(connect, peer):
    async with connect(timeout=0.2).stream() as stream:
        await asyncio.sleep(0.3)
        assert len(await collected(stream.map(FRAMES))) == 40


async def test_nobody_there(connect, unused_tcp_port):
    with pytest.raises(heatlens.UnavailableError):
        async with connect(f"127.0.0.1:{unused_tcp_port}").stream():
            pytest.fail("nobody is there")


async def test_a_closed_client_has_no_streams(connect):
    client = connect()
    stream = client.stream()
    await client.close()
    for late in (stream, client.stream()):
        with pytest.raises(heatlens.FailedPreconditionError) as caught:
            await late.send(b"x")
        assert caught.value.reason == "CLIENT_CLOSED"


async def test_a_server_that_starts_without_a_window_is_wrong(connect, peer):
    peer.streams.window = 0
    with pytest.raises(heatlens.InternalError, match="window of 0"):
        async with connect().stream():
            pytest.fail("it was wrong")


# Broken.


async def test_a_broken_stream_gives_what_it_has_then_says_where_to_go_on(connect, peer):
    peer.streams.breaks = (5, grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    client, items = connect(), []
    with pytest.raises(heatlens.UnavailableError) as caught:
        async with client.stream() as stream:
            await collected(stream.map(FRAMES), items)
    assert [item.frame_id for item in items] == [0, 1, 2, 3, 4]
    assert (caught.value.last_frame_id, caught.value.reason) == (4, "SERVER_DRAINING")
    assert stream.last_frame_id == 4
    peer.streams.breaks = None
    async with client.stream() as again:
        items += await collected(again.map(FRAMES[caught.value.last_frame_id + 1 :]))
    assert [item.frame for item in items] == FRAMES


async def test_the_servers_words_survive_a_write_that_fails(connect, peer):
    # grpc.aio makes up "Internal error from Core" when the server ends a stream that is being written to.
    peer.streams.breaks = (5, grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    client = connect()
    for _ in range(40):
        items = []
        with pytest.raises(heatlens.UnavailableError) as caught:
            async with client.stream(max_in_flight=8) as stream:
                await collected(stream.map(FRAMES), items)
        assert (caught.value.reason, caught.value.last_frame_id, len(items)) == ("SERVER_DRAINING", 4, 5)


async def test_a_stream_that_breaks_before_its_first_answer(connect, peer):
    peer.streams.breaks = (0, grpc.StatusCode.INTERNAL, "INTERNAL")
    async with connect().stream() as stream:
        with pytest.raises(heatlens.InternalError) as caught:
            await collected(stream.map(FRAMES))
    assert caught.value.last_frame_id is None


async def test_a_broken_stream_raises_again_and_again(connect, peer):
    peer.streams.breaks = (1, grpc.StatusCode.UNAVAILABLE, "X")
    async with connect().stream() as stream:
        await stream.send(b"a")
        await settled(lambda: stream.last_frame_id == 0)
        await asyncio.sleep(0.05)
        assert (await stream.receive()).frame_id == 0, "what came before comes first"
        for call in (stream.receive, lambda: stream.send(b"b"), lambda: anext(stream), stream.receive):
            with pytest.raises(heatlens.UnavailableError) as caught:
                await call()
            assert caught.value.last_frame_id == 0


async def test_a_server_that_goes_away(connect, peer):
    peer.streams.gate.clear()
    async with connect().stream() as stream:
        await stream.send(b"a")
        await settled(lambda: peer.streams.frames)
        await asyncio.to_thread(peer.server.stop(0).wait)
        with pytest.raises(heatlens.UnavailableError) as caught:
            await asyncio.wait_for(stream.receive(), 10)
    assert caught.value.last_frame_id is None


@pytest.mark.parametrize(
    "wrong",
    [
        explain_pb2.StreamExplainResponse(frame_id=5, skipped={}),
        explain_pb2.StreamExplainResponse(frame_id=0),
        explain_pb2.StreamExplainResponse(started={"max_in_flight": 3}),
    ],
)
async def test_an_answer_out_of_turn_ends_the_stream(connect, peer, wrong):
    peer.streams.reply = lambda frame, index, config: wrong
    async with connect().stream() as stream:
        await stream.send(b"a")
        with pytest.raises(heatlens.InternalError) as caught:
            await stream.receive()
    assert caught.value.reason == "INVALID_RESPONSE"
    assert caught.value.request_id
    await settled(lambda: peer.streams.open == 0)


async def test_a_server_that_ends_early_is_wrong(connect, peer):
    peer.streams.serve = lambda arrived, context: iter(
        [explain_pb2.StreamExplainResponse(started={"max_in_flight": 3})]
    )
    async with connect().stream() as stream:
        with pytest.raises(heatlens.InternalError, match="ended the stream early"):
            await stream.receive()
