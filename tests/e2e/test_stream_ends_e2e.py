"""StreamExplain under pressure and at its end: drops, deadlines, cancels, stalls, limits, drain. Counters balance."""

import asyncio
import logging
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.duration_pb2 import Duration

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.app import Server
from in_process_server import DeviceGate, balanced, batcher_of, until
from messages import distinct, pixels
from raw_stream import IMAGE, PATIENCE_S, RawStream, a_clean_stream_works, kinds, status_details

DROP_OLDEST = pb.OVERFLOW_POLICY_DROP_OLDEST


@pytest.fixture
def gate(live: Server) -> Iterator[DeviceGate]:
    made = DeviceGate(live)
    yield made
    made.open()


async def running(stream: RawStream, gate: DeviceGate) -> None:
    """Frame 0 of an open stream is in the device, behind a closed gate."""
    gate.close()
    entered = gate.entered
    await stream.send(0, IMAGE)
    await until(lambda: gate.entered == entered + 1)


async def test_dropping_keeps_the_newest_and_answers_the_oldest_at_once(live, stub, gate):
    await gate.fill()
    stream = RawStream(stub)
    await stream.open(overflow_policy=DROP_OLDEST, max_in_flight=8)
    for i in range(12):
        await stream.send(i, IMAGE)
    # As many wait as fit in a batch, though the window is larger; the others are answered while nothing runs.
    dropped = await stream.answers(8)
    assert kinds(dropped) == [(i, "RESOURCE_EXHAUSTED") for i in range(8)]
    assert {status_details(answer).info.reason for answer in dropped} == {"FRAME_DROPPED"}
    assert len(batcher_of(live)) == 4
    gate.open()
    assert kinds(await stream.finish()) == [(i, "result") for i in range(8, 12)]


async def test_frames_that_run_are_not_dropped_and_one_more_is_let_in(live, stub, gate):
    stream = RawStream(stub)
    await stream.open(overflow_policy=DROP_OLDEST, max_in_flight=1)
    await running(stream, gate)
    await gate.fill()  # the batch ahead would claim the second one
    for i in (1, 2, 3):
        await stream.send(i, IMAGE)
    await until(lambda: live.streams.counters.frames.created == 4)
    assert len(batcher_of(live)) == 1
    gate.open()
    answers = await stream.finish()
    assert kinds(answers) == [(0, "result"), (1, "RESOURCE_EXHAUSTED"), (2, "RESOURCE_EXHAUSTED"), (3, "result")]


async def test_unsent_answers_of_dropped_frames_are_bounded(live, stub, gate):
    live.streams.max_unsent = 64
    stream = RawStream(stub)
    await stream.open(overflow_policy=DROP_OLDEST, max_in_flight=2)
    await running(stream, gate)
    await gate.fill()
    sending = asyncio.create_task(send_many(stream, range(1, 200)))
    frames = live.streams.counters.frames
    await until(lambda: frames.open == 2 + 64)
    await a_round_trip(stub)
    assert frames.open == 2 + 64
    gate.open()
    answers = await stream.answers(200)
    await sending
    assert await stream.finish() == []
    assert [answer.frame_id for answer in answers] == list(range(200))
    assert answers[-1].WhichOneof("payload") == "result"


async def send_many(stream: RawStream, ids) -> None:
    for i in ids:
        await stream.send(i, IMAGE)


async def a_round_trip(stub) -> None:
    """Whatever the server can do with what it has received, it has done afterwards: three calls that it refuses."""
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Explain(pb.ExplainRequest())


async def test_a_frame_that_waits_too_long_is_not_run_and_the_stream_goes_on(live, stub, gate):
    stream = RawStream(stub)
    await stream.open(frame_timeout=Duration(nanos=50_000_000))
    await gate.fill()
    await stream.send(1, IMAGE)
    late = await stream.answer()
    assert kinds([late]) == [(1, "DEADLINE_EXCEEDED")]
    assert status_details(late).info.reason == "DEADLINE_EXPIRED"
    gate.open()
    await until(lambda: gate.entered == 2)
    assert gate.batches == [[(0, 0, 0)]] * 2
    patient = RawStream(stub)
    await patient.open(frame_timeout=Duration(seconds=315_576_000_000))
    await patient.send(1, IMAGE)
    assert kinds(await patient.finish()) == [(1, "result")]
    assert await stream.finish() == []


async def test_a_large_window_starves_neither_a_small_one_nor_a_call(live, stub, gate):
    images = distinct(42)
    held = batcher_of(live)
    await gate.fill()
    greedy, modest = RawStream(stub), RawStream(stub)
    await greedy.open(max_in_flight=64)
    await modest.open(max_in_flight=1)
    for i in range(40):
        await greedy.send(i, images[i])
    await until(lambda: len(held) == 40)
    await modest.send(0, images[40])
    call = stub.Explain(pb.ExplainRequest(image=pixels(images[41])))
    await until(lambda: held.waiting == 42)
    gate.open()
    assert kinds([await modest.answer()]) == [(0, "result")]
    assert (await call).explanations
    marks = [tuple(image[0, 0]) for image in images]
    first_two = [mark for batch in gate.batches[2:4] for mark in batch]
    assert marks[40] in first_two
    assert marks[41] in first_two
    assert kinds(await greedy.finish()) == [(i, "result") for i in range(40)]
    assert await modest.finish() == []


async def test_clients_that_vanish_at_any_moment_leave_nothing_behind(live, caplog):
    for steps in range(12):
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{live.port}", options=[("grpc.use_local_subchannel_pool", 1)]
        ) as own:
            stream = RawStream(explain_pb2_grpc.ExplainServiceStub(own))
            if steps:
                await stream.configure()
            for i in range(steps - 1):
                await stream.send(i, IMAGE)
            if steps % 2:
                await asyncio.sleep(0)
        await balanced(live)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_too_many_streams_are_refused_and_places_come_back(live, stub):
    first = [RawStream(stub) for _ in range(3)]
    await first[0].open()
    await first[1].open()
    await until(lambda: live.streams.counters.streams.open == 3)  # the third holds its place before it says anything
    refused = RawStream(stub)
    code, details, _ = await refused.failure()
    assert (code, details.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT")
    assert details.info.metadata["max_streams"] == "3"
    assert details.has_retry
    assert int(details.pushback_ms) > 0
    assert await first[0].finish() == []
    await a_clean_stream_works(stub)
    first[2].call.cancel()
    assert await first[1].finish() == []


async def test_drain_answers_what_runs_and_ends_every_stream(live, stub, gate):
    idle, silent, busy = (RawStream(stub) for _ in range(3))
    await idle.open()
    await until(lambda: live.streams.counters.streams.open == 3)  # one of them has said nothing at all
    await busy.open(max_in_flight=4)
    await running(busy, gate)
    await gate.fill()
    for i in range(1, 10):
        await busy.send(i, IMAGE)
    await until(lambda: len(batcher_of(live)) == 3)
    draining = asyncio.create_task(live.drain(PATIENCE_S))
    for stream in (idle, silent):
        code, details, answers = await stream.failure()
        assert (code, details.info.reason, answers) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING", [])
        assert int(details.pushback_ms) > 0
    gate.open()
    code, details, answers = await busy.failure()
    assert (code, details.info.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
    assert kinds(answers) == [(0, "result")]  # a client goes on after it, elsewhere
    async with asyncio.timeout(10):  # no half-close is waited for, and the grace is not used up
        assert await draining


async def test_drain_tells_a_client_that_half_closed_and_did_not_get_everything(live, stub, gate):
    stream = RawStream(stub)
    await stream.open()
    await running(stream, gate)
    await gate.fill()
    await stream.send(1, IMAGE)
    await stream.call.done_writing()
    await until(lambda: len(batcher_of(live)) == 1)
    draining = asyncio.create_task(live.drain(PATIENCE_S))
    await until(lambda: len(batcher_of(live)) == 0)
    gate.open()
    code, _, answers = await stream.failure()
    assert (code, kinds(answers)) == (grpc.StatusCode.UNAVAILABLE, [(0, "result")])
    assert await draining


@pytest.mark.parametrize("policy", [pb.OVERFLOW_POLICY_BLOCK, DROP_OLDEST])
async def test_a_reader_that_stalls_holds_neither_other_streams_nor_the_drain(live, policy):
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0), ("grpc.enable_retries", 0)]
    address = f"127.0.0.1:{live.port}"
    async with grpc.aio.insecure_channel(address, options=options) as own, grpc.aio.insecure_channel(address) as other:
        stalled = RawStream(explain_pb2_grpc.ExplainServiceStub(own))
        large = pb.ExplainOptions(top_k=10, map_size=pb.MAP_SIZE_INPUT)
        await stalled.configure(options=large, max_in_flight=4, overflow_policy=policy)
        sending = asyncio.create_task(send_many(stalled, range(10_000)))
        # No answer is ever read: sooner or later the server can neither send nor, therefore, read.
        frames = live.streams.counters.frames
        reads = -1
        while frames.created != reads or frames.open == 0:
            reads = frames.created
            await asyncio.sleep(0.2)
        bound = 4 if policy == pb.OVERFLOW_POLICY_BLOCK else 4 + live.streams.max_unsent
        assert 0 < frames.open <= bound
        assert not sending.done()
        await a_clean_stream_works(explain_pb2_grpc.ExplainServiceStub(other))
        loop = asyncio.get_running_loop()
        started = loop.time()
        assert await live.drain(0.5)
        assert loop.time() - started < 8
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
    await balanced(live)
