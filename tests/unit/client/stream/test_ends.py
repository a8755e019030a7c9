"""However a stream ends, it says so, says where, and leaves nothing behind. Both clients, a scripted server."""

import asyncio
import contextlib
import gc
import threading
import time

import psutil
import pytest

import heatlens
from stream_adapters import FRAMES, collected, settled


def our_threads():
    """Threads of open streams: ours, and gRPC's that run our request iterators or wait for calls."""
    return [
        thread for thread in threading.enumerate() if not thread.name.startswith(("MainThread", "asyncio_", "Thread"))
    ]


class OutOfFilm(Exception):
    pass


async def test_what_the_iterable_raises_comes_after_the_answers(connect, peer):
    def frames():
        yield from FRAMES[:7]
        raise OutOfFilm

    items = []
    async with connect().stream(max_in_flight=3) as stream:
        with pytest.raises(OutOfFilm):
            await collected(stream.map(frames()), items)
        assert [item.frame_id for item in items] == list(range(7))
        assert len(await collected(stream.map(FRAMES))) == 40, "the stream lives"


async def test_what_the_loop_raises_is_what_is_raised(connect, peer):
    peer.streams.gate.clear()
    peer.streams.permits.release()

    async def watch():
        async with connect().stream() as stream:
            async for _ in stream.map(FRAMES):
                raise OutOfFilm

    with pytest.raises(OutOfFilm):
        await watch()
    await settled(lambda: peer.streams.statuses)
    assert peer.streams.statuses == ["cancelled"]


async def test_a_loop_left_early_forgets_its_answers(connect, peer):
    async with connect().stream(max_in_flight=4) as stream:
        async with contextlib.aclosing(stream.map(FRAMES)) as answers:
            async for item in answers:
                if item.frame_id == 2:
                    break
        again = await collected(stream.map(FRAMES[:5]))
        assert [item.frame for item in again] == FRAMES[:5]
        ids = [item.frame_id for item in again]
        assert ids == list(range(ids[0], ids[0] + 5))
        assert 3 <= ids[0] <= 7
        assert [item.result.explanations[0].class_id for item in again] == ids


async def test_a_generator_that_was_never_started_costs_nothing(connect, peer):
    async with connect().stream() as stream:
        before = set(threading.enumerate())
        answers = stream.map(FRAMES)
        assert set(threading.enumerate()) <= before
        assert len(await collected(stream.map(FRAMES[:3]))) == 3
        await answers.aclose()
    stream = connect().stream()
    stream.map(FRAMES)
    await stream.close()
    assert len(peer.streams.configs) == 1


async def test_close_is_idempotent_and_final(connect, peer):
    stream = connect().stream()
    await stream.send(b"a")
    answers = connect().stream().map(FRAMES)
    for _ in range(3):
        await stream.close()
    for call in (lambda: stream.send(b"b"), stream.receive, lambda: anext(stream), lambda: anext(stream.map(FRAMES))):
        with pytest.raises(heatlens.FailedPreconditionError) as caught:
            await call()
        assert caught.value.reason == "STREAM_CLOSED"
    await stream.finish()
    await answers.aclose()


@pytest.mark.parametrize("who", ["stream", "client"])
async def test_close_from_elsewhere_ends_the_waiting(connect, peer, who):
    peer.streams.gate.clear()
    peer.streams.permits.release()
    client = connect()
    stream = client.stream(max_in_flight=2)
    items = []
    looping = asyncio.create_task(collected(stream.map(FRAMES), items))
    await settled(lambda: items)
    await (stream if who == "stream" else client).close()
    with pytest.raises(heatlens.CallCancelledError) as caught:
        await asyncio.wait_for(looping, 5)
    assert caught.value.last_frame_id == 0
    await stream.close()
    await settled(lambda: peer.streams.open == 0)


async def test_close_while_a_sender_waits(connect, peer):
    peer.streams.gate.clear()
    stream = connect().stream(max_in_flight=1)
    await stream.send(b"a")
    sending = asyncio.create_task(stream.send(b"b"))
    await asyncio.sleep(0.05)
    await stream.close()
    with pytest.raises(heatlens.CallCancelledError):
        await asyncio.wait_for(sending, 5)


@pytest.mark.serial
async def test_an_iterable_that_hangs_does_not_hang_the_end(connect, peer):
    hangs = threading.Event()

    def frames():
        yield b"a"
        hangs.wait(60)

    began = time.monotonic()
    try:
        async with connect().stream() as stream, contextlib.aclosing(stream.map(frames())) as answers:
            await anext(answers)
        assert time.monotonic() - began < 4
        await settled(lambda: peer.streams.open == 0)
    finally:
        hangs.set()
    await settled(lambda: not any("pump" in thread.name or "puller" in thread.name for thread in threading.enumerate()))


async def test_a_frame_on_its_way_when_the_loop_is_left_is_waited_for(connect, peer):
    # The caller releases his camera next.
    reading = threading.Lock()

    def frames():
        while True:
            with reading:
                time.sleep(0.05)
            yield b"a"

    async with connect().stream() as stream:
        async with contextlib.aclosing(stream.map(frames())) as answers:
            async for item in answers:
                if item.frame_id == 1:
                    break
        for _ in range(20):
            assert not reading.locked()
            await asyncio.sleep(0.005)


async def test_200_streams_leave_nothing_behind(connect, peer):
    client = connect()

    async def some_streams(count):
        for i in range(count):
            stream = client.stream(max_in_flight=2)
            async with stream, contextlib.aclosing(stream.map(FRAMES[:5])) as answers:
                async for item in answers:
                    if i % 2 and item.frame_id == 1:
                        break

    def counts():
        gc.collect()
        return len(our_threads()), len(asyncio.all_tasks()), psutil.Process().num_fds()

    await some_streams(10)
    before = counts()
    await some_streams(200)
    await settled(lambda: peer.streams.open == 0)
    assert all(after <= first + 2 for after, first in zip(counts(), before, strict=True)), (before, counts())
