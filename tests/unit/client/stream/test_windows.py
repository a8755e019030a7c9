"""Windows of streams, and sending frames one by one. Both clients, a scripted server."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest

import heatlens
from heatlens import HeatlensError, InvalidArgumentError
from heatlens._stream.calls import AsyncCondition
from stream_adapters import FRAMES, INF, NAN, collected, running, settled


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


async def test_every_counts_right_when_the_frame_held_back_leaves_while_the_next_is_read(connect, peer, tmp_path):
    script = peer.streams
    script.gate.clear()
    file = tmp_path / "frame.jpg"
    file.write_bytes(b"d")

    class Slow:
        def __fspath__(self):
            script.gate.set()
            script.wait_for(lambda: len(script.frames) >= 3)
            return str(file)

    async with connect().stream(max_in_flight=1, overflow="drop-oldest", every=2) as stream:
        for frame in (b"a", b"b", b"c"):
            await stream.send(frame)
        await settled(lambda: len(script.frames) == 2)
        await stream.send(Slow())
        items = [await stream.receive() for _ in range(4)]
    assert [item.skipped for item in items] == [False, True, False, True]
    assert [frame.HasField("image") for frame in script.frames] == [True, False, True, False]


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


async def test_one_use_at_a_time(connect, peer, monkeypatch):
    # How long the loop of a map may have been left before its generator is closed.
    monkeypatch.setattr(AsyncCondition, "CLOSING_TIMEOUT_S", 0.05)
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
