"""What only one of the two clients does: threads and Ctrl-C there, tasks and asynchronous iterables here."""

import asyncio
import itertools
import os
import signal
import socket
import threading
import time

import pytest

from heatlens import AsyncClient, Client, DeadlineExceededError
from stream_adapters import FRAMES, settled
from stream_script import reply_to


def test_leaving_a_for_loop_stops_the_pump_at_once(peer):
    with Client(peer.address) as client, client.stream() as stream:
        for _ in stream.map(FRAMES):
            break
        assert not any("pump" in thread.name for thread in threading.enumerate())
        assert [item.frame for item in stream.map(FRAMES[:2])] == FRAMES[:2]
    assert not any("heatlens" in thread.name for thread in threading.enumerate())


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c(peer):
    peer.streams.gate.clear()
    peer.streams.permits.release()

    def interrupt():
        peer.streams.wait_for(lambda: len(peer.streams.frames) > 1)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    items = []
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), Client(peer.address) as client, client.stream() as stream:
        items.extend(stream.map(FRAMES))
    peer.streams.wait_for(lambda: peer.streams.open == 0)
    assert not any("heatlens" in thread.name for thread in threading.enumerate())


def test_a_ctrl_c_that_is_ignored(peer):
    """As under `nohup`, or in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Client(peer.address) as client, client.stream() as stream:
            frames = []
            for item in stream.map(FRAMES):
                frames.append(item.frame)
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert frames == FRAMES


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_while_opening(peer):
    peer.streams.starts.clear()

    def interrupt():
        peer.streams.wait_for(lambda: peer.streams.configs)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt), Client(peer.address) as client, client.stream():
        pytest.fail("it never opened")
    peer.streams.wait_for(lambda: peer.streams.open == 0)
    assert not any("heatlens" in thread.name for thread in threading.enumerate())


async def test_leaving_an_async_for_loop_and_mapping_again(peer):
    async with AsyncClient(peer.address) as client, client.stream() as stream:
        async for _ in stream.map(FRAMES):
            break
        # asyncio closes the generator only now.
        assert [item.frame async for item in stream.map(FRAMES[:2])] == FRAMES[:2]


@pytest.mark.parametrize("use", ["send", "receive"])
async def test_leaving_an_async_for_loop_and_going_on_by_hand(peer, use):
    async with AsyncClient(peer.address) as client, client.stream() as stream:
        async for _ in stream.map(FRAMES):
            break
        if use == "send":
            frame_id = await stream.send(b"z")
            item = await stream.receive()
        else:
            receiving = asyncio.create_task(stream.receive())
            await settled(lambda: stream._run is None)
            frame_id = await stream.send(b"z")
            item = await receiving
        assert (item.frame_id, item.frame) == (frame_id, b"z")


async def test_asynchronous_iterables(peer):
    closed = []

    async def frames():
        try:
            for frame in FRAMES:
                await asyncio.sleep(0)
                yield frame
        finally:
            closed.append(True)

    async with AsyncClient(peer.address) as client, client.stream() as stream:
        assert [item.frame async for item in stream.map(frames())] == FRAMES
    assert closed == [True]


async def test_an_asynchronous_iterable_that_hangs_is_cancelled(peer):
    cancelled = asyncio.Event()

    async def frames():
        yield b"a"
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with AsyncClient(peer.address) as client, client.stream() as stream:
        async for _ in stream.map(frames()):
            await asyncio.sleep(0.01)
            break
    assert cancelled.is_set()


async def test_a_blocking_iterable_does_not_hold_up_the_event_loop(peer):
    def frames():
        for frame in FRAMES[:5]:
            time.sleep(0.05)
            yield frame

    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with AsyncClient(peer.address) as client, client.stream() as stream:
        assert len([item async for item in stream.map(frames())]) == 5
    ticking.cancel()
    assert ticks > 20


async def test_a_cancelled_task_ends_its_stream(peer):
    peer.streams.gate.clear()
    peer.streams.permits.release()
    got = asyncio.Event()

    async def watch():
        async with AsyncClient(peer.address) as client, client.stream() as stream:
            async for _ in stream.map(FRAMES):
                got.set()

    watching = asyncio.create_task(watch())
    await got.wait()
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await settled(lambda: peer.streams.open == 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_task_cancelled_while_it_opens_a_stream(peer):
    peer.streams.starts.clear()

    async def watch():
        async with AsyncClient(peer.address) as client, client.stream():
            pytest.fail("it never opened")

    watching = asyncio.create_task(watch())
    await settled(lambda: peer.streams.configs)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await settled(lambda: peer.streams.open == 0)


HOSTS = itertools.count(2)


@pytest.fixture
def silent_address():
    """A server that takes connections and does not speak.

    Each has an address of its own: gRPC shares connections of one address, also those that an earlier test's had reset.
    """
    host = f"127.0.0.{next(HOSTS)}"
    with socket.create_server((host, 0)) as listener:
        yield f"{host}:{listener.getsockname()[1]}"


async def open_stream(client, how):
    if how == "with":
        async with client.stream():
            pytest.fail("it never opened")
    await client.stream().send(b"a")


@pytest.mark.serial
@pytest.mark.parametrize("how", ["with", "first use"])
@pytest.mark.parametrize("after_s", [0, 0.1])
async def test_giving_up_on_a_silent_server_is_prompt_and_leaves_no_task(silent_address, how, after_s):
    async with AsyncClient(silent_address) as client:
        opening = asyncio.create_task(open_stream(client, how))
        await asyncio.sleep(after_s)
        began = time.monotonic()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        assert time.monotonic() - began < 0.5
    await settled(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@pytest.mark.serial
@pytest.mark.parametrize("how", ["with", "first use"])
async def test_a_silent_server_times_out_in_time_and_leaves_no_task(silent_address, how):
    began = time.monotonic()
    async with AsyncClient(silent_address, timeout=0.1) as client:
        with pytest.raises(DeadlineExceededError):
            await open_stream(client, how)
        assert time.monotonic() - began < 0.6
        await settled(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_streams_cancelled_at_any_moment_leave_no_task(peer):
    async def watch(client):
        async with client.stream() as stream:
            while True:
                await stream.send(b"a")
                await stream.receive()

    async with AsyncClient(peer.address) as client:
        for after_s in (0, 0.001, 0.003, 0.01, 0.03):
            watching = asyncio.create_task(watch(client))
            await asyncio.sleep(after_s)
            watching.cancel()
            await asyncio.wait([watching], timeout=5)
            assert watching.cancelled()
            # Not only at the end: a client may live for weeks.
            await settled(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_cancelled_sender_harms_nobody(peer):
    peer.streams.gate.clear()
    async with AsyncClient(peer.address) as client, client.stream(max_in_flight=1) as stream:
        await stream.send(b"a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await stream.send(b"lost")
        peer.streams.gate.set()
        assert (await stream.receive()).frame == b"a"
        assert await stream.send(b"b") == 1
        assert (await stream.receive()).frame == b"b"


def test_the_loop_ends_in_mid_stream(peer):
    async def watch():
        stream = AsyncClient(peer.address).stream()
        async for _ in stream.map(FRAMES):
            return

    asyncio.run(watch())
    peer.streams.wait_for(lambda: peer.streams.open == 0)


def test_slow_replies_do_not_slow_other_streams(peer):
    slow = threading.Event()

    def reply(frame, index, config):
        if config.model == "slow":
            slow.wait(30)
        return reply_to(frame, index, config)

    peer.streams.reply = reply
    try:
        with Client(peer.address) as client, client.stream(model="slow") as stalled, client.stream() as stream:
            stalled.send(b"a")
            assert len(list(stream.map(FRAMES))) == 40
            slow.set()
            assert stalled.receive().frame_id == 0
    finally:
        slow.set()
