"""Streams that go on by another call where one breaks."""

import time

import grpc
import numpy as np
import pytest

import heatlens
from heatlens._stream.window import Window
from stream_adapters import FRAMES, collected, settled
from stream_script import frame_status, reply_to

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
ENTRY = {"accepted_s": 0.0, "now_s": 0.0}


def draining(*counts):
    """Streams that end after so many answers each."""
    return [(count, UNAVAILABLE, "SERVER_DRAINING") for count in counts]


@pytest.mark.parametrize("overflow", ["block", "drop-oldest"])
async def test_every_frame_is_answered_once_and_in_order(connect, peer, overflow):
    peer.streams.breaks = draining(5, 1, 7)
    async with connect().stream(resume=True, max_in_flight=4, overflow=overflow) as stream:
        items = await collected(stream.map(FRAMES))
    assert [item.frame_id for item in items] == list(range(len(FRAMES)))
    if overflow == "block":
        assert all(item.result is not None for item in items)
        assert len(peer.streams.configs) == 4
    # What had an answer was not sent again; what had none was.
    ids = [frame.frame_id for frame in peer.streams.frames]
    assert {item.frame_id for item in items if not item.dropped} <= set(ids)
    assert len(ids) < len(FRAMES) + 3 * 8
    assert [item.frame for item in items] == FRAMES


@pytest.mark.parametrize("breaks", [(1,), (2,), (3,), (5, 1, 7), (0, 4, 1, 1)])
async def test_every_goes_on_counting(connect, peer, breaks):
    """Each server explains the first frame that reaches it, and every third from there."""
    peer.streams.breaks = draining(*breaks)
    async with connect().stream(resume=True, every=3, max_in_flight=4) as stream:
        items = await collected(stream.map(FRAMES))
    assert [(item.frame_id, item.skipped) for item in items] == [(i, i % 3 > 0) for i in range(len(FRAMES))]
    assert all(item.result is not None for item in items[::3])
    assert len(peer.streams.configs) == len(breaks) + 1


async def test_a_frame_that_a_server_gives_up_goes_to_the_next(connect, peer):
    given_up = []

    def reply(frame, index, config):
        answer = reply_to(frame, index, config)
        if frame.frame_id == 3 and not given_up:
            given_up.append(frame.frame_id)
            answer.ClearField("result")
            answer.error.CopyFrom(frame_status("SERVER_DRAINING", code=UNAVAILABLE.value[0]))
        return answer

    peer.streams.reply = reply
    async with connect().stream(resume=True) as stream:
        items = await collected(stream.map(FRAMES))
    assert given_up == [3]
    assert all(item.result is not None for item in items)


async def test_sending_and_finishing_go_on_too(connect, peer):
    peer.streams.breaks = draining(2)
    async with connect().stream(resume=True, max_in_flight=2) as stream:
        for frame in FRAMES[:2]:
            await stream.send(frame)
        assert [(await stream.receive()).frame_id for _ in range(2)] == [0, 1]
        await stream.send(FRAMES[2])
        await stream.finish()
        assert [item.frame_id for item in await collected(stream)] == [2]


async def test_without_progress_it_gives_up_after_the_timeout_and_says_where(connect, peer):
    peer.streams.breaks = draining(3, *[0] * 1000)
    items, began = [], time.monotonic()
    with pytest.raises(heatlens.UnavailableError) as caught:
        async with connect(timeout=0.5).stream(resume=True) as stream:
            await collected(stream.map(FRAMES), items)
    assert time.monotonic() - began < 30
    assert len(items) == 3
    assert caught.value.last_frame_id == 2
    assert 2 < len(peer.streams.configs) < 8


@pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT])
async def test_other_ends_are_not_gone_on_from(connect, peer, code):
    peer.streams.breaks = (2, code, "X")
    with pytest.raises(heatlens.HeatlensError):
        async with connect().stream(resume=True) as stream:
            await collected(stream.map(FRAMES))
    assert len(peer.streams.configs) == 1


async def test_opening_is_not_tried_again(connect, peer):
    peer.streams.refuses = (UNAVAILABLE, "MODEL_LOADING")
    with pytest.raises(heatlens.UnavailableError):
        async with connect().stream(resume=True):
            pytest.fail("it was refused")
    assert len(peer.streams.configs) == 1


async def test_closing_ends_the_wait_for_the_next_call(connect, peer):
    peer.streams.breaks = (1, UNAVAILABLE, "SERVER_DRAINING")
    client = connect(timeout=None)
    stream = client.stream(resume=True)
    await stream.send(FRAMES[0])
    await stream.receive()
    await stream.send(FRAMES[1])
    await settled(lambda: len(peer.streams.configs) > 1)
    began = time.monotonic()
    await stream.close()
    assert time.monotonic() - began < 5
    with pytest.raises(heatlens.FailedPreconditionError):
        await stream.send(FRAMES[2])


async def test_a_closed_client_ends_it(connect, peer):
    peer.streams.breaks = draining(1, *[0] * 1000)
    client = connect(timeout=None)
    stream = client.stream(resume=True)
    await stream.send(FRAMES[0])
    await stream.receive()
    await stream.send(FRAMES[1])
    await client.close()
    with pytest.raises(heatlens.HeatlensError):
        await stream.receive()
    await stream.close()


async def test_resume_is_true_or_false(connect):
    with pytest.raises(heatlens.InvalidArgumentError) as caught:
        connect().stream(resume=1)
    assert caught.value.field_violations[0].field == "resume"


def test_a_window_sends_what_has_no_answer_again_and_forgets_what_nobody_waits_for():
    window = Window(drop_oldest=False, every=1, keeps_sent=True)
    window.start(4)
    for frame_id in range(3):
        window.put(frame_id, np.zeros(1), f"frame {frame_id}", **ENTRY)
    window.answer(0, now_s=0.0)
    window.resume("config", now_s=0.0)
    assert list(window.outgoing) == ["config", "frame 1", "frame 2"]
    assert not window.can_put
    window.start(4)
    window.forget()
    window.resume("config", now_s=0.0)
    assert list(window.outgoing) == ["config"]
    window.start(1)
    assert window.can_put


def test_a_window_sends_no_frame_first_that_is_left_out():
    """Nobody answers those before it but the window, whether they were sent, are held back or come later."""
    window = Window(drop_oldest=True, every=4, keeps_sent=True)
    window.start(1)
    for frame_id in range(3):
        window.put(frame_id, np.zeros(1), f"frame {frame_id}", **ENTRY)
    window.answer(0, now_s=0.0, skipped=True)
    window.put(3, np.zeros(1), "frame 3", **ENTRY)
    # 3 is held back until 1 is answered.
    assert list(window.outgoing) == ["frame 0", "frame 1", "frame 2"]
    window.resume("config", now_s=1.0)
    window.start(1)
    assert list(window.outgoing) == ["config"]
    window.put(4, np.zeros(1), "frame 4", **ENTRY)
    assert list(window.outgoing) == ["config", "frame 4"]
    window.answer(4, now_s=0.0)
    found = [window.take() for _ in range(5)]
    assert [(item.frame_id, item.skipped, item.latency_ms) for item in found] == [
        (0, True, 0.0), (1, True, 1000.0), (2, True, 1000.0), (3, True, 0.0), (4, False, 0.0)
    ]  # fmt: skip


def test_a_window_goes_on_where_every_leaves_out_what_comes_next():
    window = Window(drop_oldest=False, every=3, keeps_sent=True)
    window.start(2)
    window.put(0, np.zeros(1), "frame 0", **ENTRY)
    window.answer(0, now_s=0.0)
    window.resume("config", now_s=0.0)
    window.start(2)
    for frame_id in range(1, 5):
        assert window.next_is_skipped == (frame_id % 3 > 0)
        window.put(frame_id, np.zeros(1), f"frame {frame_id}", **ENTRY)
    assert list(window.outgoing) == ["config", "frame 3", "frame 4"]
