"""Streams that are cancelled, or run out of time, or go wrong, in every state, and servers that are stopped."""

import asyncio
import logging
import signal
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from heatlens import AsyncClient, CallCancelledError, UnavailableError
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from in_process_server import DeviceGate, balanced, until
from messages import pixels
from raw_stream import IMAGE, PATIENCE_S, RawStream, a_clean_stream_works, kinds, own_channel
from server_process import ServerProcess, wait_settled
from server_toml import model_toml, server_toml

MIB = 2**20
BLOCK, DROP_OLDEST = pb.OVERFLOW_POLICY_BLOCK, pb.OVERFLOW_POLICY_DROP_OLDEST
POLICIES = pytest.mark.parametrize("policy", [BLOCK, DROP_OLDEST], ids=["block", "drop-oldest"])

Stub = explain_pb2_grpc.ExplainServiceStub

# Cancels, deadlines and garbage.


@pytest.fixture
def gate(live) -> DeviceGate:
    return DeviceGate(live, "mlp")


async def into_state(state: str, stream: RawStream, live, gate: DeviceGate, policy: int) -> None:
    """Bring a stream into a state. The gate is closed."""
    counters = live.streams.counters
    if state == "silent":
        await until(lambda: counters.streams.open == 1)
        return
    config = {"max_in_flight": 64 if state == "window of 64 full" else 1, "overflow_policy": policy}
    if state == "configured":
        await stream.configure(**config)
        await until(lambda: counters.streams.open == 1)
        return
    await stream.open(**config)
    if state == "started":
        return
    await stream.send(0, IMAGE)
    await until(lambda: gate.entered == 1)
    if state == "running":
        return
    # Otherwise the batch ahead would claim what is to wait.
    await gate.fill()
    # Frames that are not read stay in the network, which holds some of them.
    for i in range(1, 80 if policy == DROP_OLDEST else config["max_in_flight"] + 10):
        await stream.send(i, IMAGE)
    if policy == DROP_OLDEST:
        # Most are dropped, and their answers wait for the one of frame 0.
        await until(lambda: counters.frames.open > 60)
    else:
        await until(lambda: counters.frames.open == config["max_in_flight"])


STATES = ["silent", "configured", "started", "running", "window of 1 full", "window of 64 full"]


@POLICIES
@pytest.mark.parametrize("state", STATES)
async def test_a_cancel_in_every_state_gives_everything_back(live, stub, gate, state, policy, caplog):
    caplog.set_level(logging.INFO, "heatlens.rpc")
    with gate.closed():
        stream = RawStream(stub)
        await into_state(state, stream, live, gate, policy)
        stream.call.cancel()
        await balanced(live)  # while the device still holds what it has
    await until(lambda: [record for record in caplog.records if hasattr(record, "code")])
    (code,) = (record.code for record in caplog.records if hasattr(record, "code"))
    # Where no frame is open, the server may read the end of the requests before it hears of the cancel.
    # That end comes before the configuration in a stream that was silent.
    ends = {"silent": ("OK", "INVALID_ARGUMENT"), "configured": ("OK",), "started": ("OK",)}
    assert code in ("CANCELLED", *ends.get(state, ()))
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    await a_clean_stream_works(stub)


@POLICIES
@pytest.mark.parametrize("state", STATES)
async def test_a_cancel_while_the_server_drains_gives_everything_back(live, stub, gate, state, policy, caplog):
    with gate.closed():
        stream = RawStream(stub)
        await into_state(state, stream, live, gate, policy)
        draining = asyncio.create_task(live.drain(PATIENCE_S))
        await until(lambda: live.streams._draining)
        stream.call.cancel()
        await balanced(live)
        # Nothing is left to wait for but the batch in the device.
        gate.open()
        async with asyncio.timeout(5):
            assert await draining
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("overflow", ["block", "drop-oldest"])
@pytest.mark.parametrize("window", [1, 64])
async def test_closing_the_sdks_stream_in_mid_flight_gives_everything_back(live, gate, overflow, window):
    frames = live.streams.counters.frames
    with gate.closed():
        async with AsyncClient(f"127.0.0.1:{live.port}") as client:
            stream = client.stream(overflow=overflow, max_in_flight=window)
            async with stream:
                await stream.send(IMAGE)
                receiving = asyncio.create_task(stream.receive())
                await asyncio.sleep(0)  # it begins to wait
                await until(lambda: gate.entered == 1 and frames.open == 1)
                await stream.close()
                with pytest.raises(CallCancelledError):
                    await receiving
            await balanced(live)
            gate.open()
            async with client.stream(max_in_flight=window) as clean:
                assert [item.error async for item in clean.map([IMAGE] * 10)] == [None] * 10


@POLICIES
async def test_a_deadline_on_a_whole_stream_ends_it_and_gives_everything_back(live, stub, gate, policy):
    with gate.closed():
        stream = RawStream(stub, timeout=2.0)
        await into_state("running", stream, live, gate, policy)
        for i in range(1, 20):
            await stream.send(i, IMAGE)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream.answers(20)
        assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await balanced(live)
    await a_clean_stream_works(stub)


GARBAGE = {"bytes": b"\x0a\xff", "nothing": b"", "too large": b"\x00" * (2 * MIB)}


@POLICIES
@pytest.mark.parametrize("garbage", list(GARBAGE))
async def test_garbage_in_mid_stream_ends_that_stream_after_its_answers(live, channel, stub, gate, garbage, policy):
    """Another stream of the same connection notices nothing."""
    other = RawStream(stub)
    await other.open()
    stream = RawStream.of_bytes(channel)
    config = pb.StreamConfig(max_in_flight=8, overflow_policy=policy)
    await stream.call.write(pb.StreamExplainRequest(config=config).SerializeToString())
    with gate.closed():
        for i in range(4):
            frame = pb.Frame(frame_id=i, image=pixels(IMAGE))
            await stream.call.write(pb.StreamExplainRequest(frame=frame).SerializeToString())
        await until(lambda: live.streams.counters.frames.open == 4)
        await stream.call.write(GARBAGE[garbage])
    code, details, answers = await stream.failure()
    if garbage == "too large":
        # gRPC itself ends the stream, whatever was still to come.
        assert (code, details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)
    else:
        reason = "MESSAGE_UNDECODABLE" if garbage == "bytes" else "PROTOCOL_VIOLATION"
        assert (code, details.info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
        assert kinds(answers) == [(0, "started"), *((i, "result") for i in range(4))]
    await other.send(0, IMAGE)
    assert kinds(await other.finish()) == [(0, "result")]


# The server is stopped.


def armed_server(launch, folder: Path, *, slow_s: float, grace_s: float) -> ServerProcess:
    server = launch(server_toml(model_toml("slow", max_batch_size=4), grace_s=grace_s), env={"SLOW_S": str(slow_s)})
    wait_settled(server.address)
    (folder / "armed").touch()
    return server


async def seen(folder: Path) -> None:
    """Wait until a batch runs."""
    await until((folder / "seen").exists)


@pytest.mark.serial
async def test_sigterm_in_mid_stream_answers_what_runs_and_ends_with_unavailable(launch, tmp_path):
    grace_s = 10.0
    server = armed_server(launch, tmp_path, slow_s=1.0, grace_s=grace_s)
    async with own_channel(server.address) as channel, AsyncClient(server.address) as client:
        streams = [RawStream(Stub(channel)) for _ in range(3)]
        await streams[0].open(max_in_flight=16)
        await streams[0].send(0, IMAGE)
        await seen(tmp_path)
        # Frame 0 runs, for a second. The others wait, but for the next batch, which is made ready ahead.
        for stream in streams[1:]:
            await stream.open(max_in_flight=16)
        for i in range(1, 9):
            for stream in streams:
                await stream.send(i, IMAGE)
        answered = []

        async def with_the_sdk() -> None:
            async with client.stream() as stream:
                async for item in stream.map([IMAGE] * 50):
                    answered.append(item)  # noqa: PERF401 - what came before it breaks

        sdk = asyncio.create_task(with_the_sdk())
        # They were read: what was sent before, on the same connection, was too.
        with pytest.raises(grpc.aio.AioRpcError):
            await Stub(channel).Explain(pb.ExplainRequest())
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        results = 0
        for n, stream in enumerate(streams):
            code, details, answers = await stream.failure()
            assert (code, details.info.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_DRAINING")
            ids = [frame_id for frame_id, _ in kinds(answers)]
            assert ids == list(range(1 if n else 0, len(ids) + (1 if n else 0)))
            outcomes = [kind for _, kind in kinds(answers)]
            # Only those that ran, as frames of one stream run in order: a client goes on after the last answer.
            assert outcomes == ["result"] * len(outcomes)
            results += len(outcomes)
            if n == 0:
                assert outcomes[0] == "result", "frame 0 was running"
        # The batch that ran, and the one made ready ahead.
        assert 1 <= results <= 1 + 4
        with pytest.raises(UnavailableError) as raised:
            await sdk
        assert raised.value.reason == "SERVER_DRAINING"
        assert [item.frame_id for item in answered] == list(range(len(answered)))
        assert raised.value.last_frame_id == (len(answered) - 1 if answered else None)
        assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0
        # It did not use up the grace, though no client half-closed.
        assert time.monotonic() - started < grace_s
    assert '"level": "error"' not in server.log()


@pytest.mark.serial
async def test_a_batch_longer_than_the_grace_is_not_waited_for(launch, tmp_path):
    server = armed_server(launch, tmp_path, slow_s=30.0, grace_s=1.0)
    async with own_channel(server.address) as channel:
        stream = RawStream(Stub(channel))
        await stream.open()
        await stream.send(0, IMAGE)
        await seen(tmp_path)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        # Its frame is told, and then the stream.
        answer = await stream.answer()
        assert (answer.frame_id, answer.error.code) == (0, grpc.StatusCode.UNAVAILABLE.value[0])
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await stream.answer()
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(server.process.wait, PATIENCE_S) == 0
        # The grace, what is allowed for the engine to end, and the way of the interpreter.
        assert time.monotonic() - started < 1.0 + 2.0 + 3.0
