"""Streams whose clients stall, are killed, or come by the thousand. Servers run in processes of their own.

Clients are killed for KILL_S seconds; set the environment variable HEATLENS_KILL_S=60 for a full minute.
"""

import asyncio
import collections
import contextlib
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator

import grpc
import grpc.aio
import numpy as np
import pytest

from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import pixels
from observed_server import SUPPORT, ObservedServer, forget_peak, observed_server, rss_bytes
from raw_stream import IMAGE, PATIENCE_S, RawStream, a_clean_stream_works, kinds, own_channel
from server_toml import model_toml, server_toml

pytestmark = pytest.mark.serial

KILL_S = float(os.environ.get("HEATLENS_KILL_S", "4"))
KILL_SEED = 4
MAX_STREAMS = 24

TOML = server_toml(
    model_toml("mlp", "tiny_mlp", max_batch_size=8),
    log_level="warning",
    grace_s=2.0,
    max_streams=MAX_STREAMS,
    max_message_bytes=4_194_304,
)

MIB = 2**20
BLOCK, DROP_OLDEST = pb.OVERFLOW_POLICY_BLOCK, pb.OVERFLOW_POLICY_DROP_OLDEST
POLICIES = pytest.mark.parametrize("policy", [BLOCK, DROP_OLDEST], ids=["block", "drop-oldest"])

Stub = explain_pb2_grpc.ExplainServiceStub


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObservedServer]:
    with observed_server(tmp_path_factory.mktemp("shared"), TOML) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def watched(shared: ObservedServer) -> Iterator[ObservedServer]:
    """A server whose streams have given back everything, before and after the test, and that logged no error."""
    yield shared
    held = shared.until(lambda held: held.balanced)
    assert held.created == held.released
    assert "error" not in shared.log().lower()


async def send_for_ever(stream: RawStream, image: pb.Image) -> None:
    """Until the stream ends, or the task."""
    i = 0
    while True:
        await stream.call.write(pb.StreamExplainRequest(frame=pb.Frame(frame_id=i, image=image)))
        i += 1


# Readers that stall.

STALLED = 4
# 0.75 MiB for each frame and 1 MiB for each answer. Whoever read on would grow by hundreds of MiB in a second.
LARGE = np.zeros((512, 512, 3), np.uint8)
LARGE_OPTIONS = pb.ExplainOptions(top_k=1, map_size=pb.MAP_SIZE_SOURCE)
STALLED_WINDOW = 4
# For each stream that stalls: gRPC's buffers in both directions, and the window's frames and answers.
STALLED_BOUND_BYTES = 36 * MIB


async def pace_s(stub: Stub) -> float:
    """Seconds for a stream of 40 frames beside 20 calls, one after the other: the fastest of four times."""

    async def calls() -> None:
        for _ in range(20):
            assert (await stub.Explain(pb.ExplainRequest(image=pixels(IMAGE)))).explanations

    times = []
    for _ in range(4):
        started = time.monotonic()
        await asyncio.gather(a_clean_stream_works(stub, 40), calls())
        times.append(time.monotonic() - started)
    return min(times)


async def still(count: Callable[[], Awaitable[int]]) -> None:
    """Wait until a number has not changed for half a second."""
    async with asyncio.timeout(PATIENCE_S):
        last, since = -1, time.monotonic()
        while time.monotonic() < since + 0.5:
            if (now := await count()) != last:
                last, since = now, time.monotonic()
            await asyncio.sleep(0.05)


@POLICIES
async def test_readers_that_stall_cost_little_and_slow_nobody_nor_the_drain(tmp_path, policy):
    with observed_server(tmp_path, TOML) as server:
        async with own_channel(server.address) as channel, asyncio.TaskGroup() as group:
            stub = Stub(channel)
            await pace_s(stub)
            alone_s = await pace_s(stub)
            forget_peak(server.pid)
            rss_before = rss_bytes(server.pid)
            # One connection each: gRPC's flow control would otherwise stall them as one.
            stalled = [RawStream(Stub(own_channel(server.address))) for _ in range(STALLED)]
            for stream in stalled:
                await stream.configure(options=LARGE_OPTIONS, max_in_flight=STALLED_WINDOW, overflow_policy=policy)
                group.create_task(sent_until_cut_off(stream, pixels(LARGE)))

            async def read() -> int:
                return server.holdings().created["frames"]

            await still(read)
            held = server.holdings()
            assert held.open("streams") == STALLED
            assert held.open("frames") >= STALLED
            if policy == BLOCK:
                assert held.open("frames") <= STALLED * STALLED_WINDOW
            beside_s = await pace_s(stub)
            grown_bytes = rss_bytes(server.pid, peak=True) - rss_before
            print(f"pace {alone_s:.3f} s alone, {beside_s:.3f} s beside; grown by {grown_bytes / MIB:.0f} MiB")
            assert beside_s < 2 * alone_s
            assert grown_bytes < STALLED * STALLED_BOUND_BYTES
            started = time.monotonic()
            server.process.terminate()
            code = await asyncio.to_thread(server.process.wait, PATIENCE_S)
            assert (code, time.monotonic() - started < 2.0 + 3.0) == (0, True), server.log()
            for stream in stalled:
                stream.call.cancel()


async def sent_until_cut_off(stream: RawStream, image: pb.Image) -> None:
    """Send for ever, and take it that the stream ends."""
    try:
        await send_for_ever(stream, image)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        assert stream.call.done()


# Clients that are killed.


@pytest.mark.timeout(KILL_S + 90)
async def test_clients_killed_at_random_moments_leave_nothing_behind(watched):
    async def kill(seed: int, duration_s: float) -> dict[str, int]:
        nursery = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SUPPORT / "killed_clients.py"),
            *(watched.address, str(seed), str(duration_s), "6"),
            stdout=subprocess.PIPE,
        )
        out, _ = await nursery.communicate()
        assert nursery.returncode == 0
        return json.loads(out)

    # Threads that the first clients make a server start stay for the next ones.
    await kill(KILL_SEED + 1, 2)
    before = watched.until(lambda held: held.balanced)
    died = await kill(KILL_SEED, KILL_S)
    print(died)
    assert len(died) == 6
    assert sum(died.values()) > 4 * KILL_S
    after = watched.until(lambda held: held.balanced and held.fds <= before.fds)
    assert after.created["streams"] - before.created["streams"] > sum(died.values()) / 2
    assert after.created["frames"] > before.created["frames"]
    assert after.python_threads <= before.python_threads
    # gRPC's own threads come and go.
    assert after.threads <= before.threads + 4
    async with own_channel(watched.address) as channel:
        await a_clean_stream_works(Stub(channel))
    with Client(watched.address) as client, client.stream() as stream:
        assert all(item.result is not None for item in stream.map([IMAGE] * 20))


# A thousand at once.


async def one_of_a_thousand(stub: Stub, i: int) -> str:
    """A stream of one frame: how it ended."""
    stream = RawStream(stub)
    try:
        await stream.configure()
        await stream.send(i, IMAGE)
        if i % 3 == 0:
            stream.call.cancel()
            return "cancelled"
        assert kinds(await stream.finish()) == [(0, "started"), (i, "result")]
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        code, said = await stream.call.code(), await stream.call.details()
        if code is grpc.StatusCode.INTERNAL:
            # A write that meets the end of its call: grpc.aio forgets what the server said.
            assert said == "Internal error from Core"
        else:
            assert (code, said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_STREAMS} streams are open already")
        return "refused"
    return "served"


async def storm(server: ObservedServer) -> collections.Counter[str]:
    """A thousand streams at once, then as many as there may be, and one more."""
    async with contextlib.AsyncExitStack() as stack:
        # A connection may have 256 calls at once.
        stubs = [Stub(await stack.enter_async_context(own_channel(server.address))) for _ in range(5)]
        ends = collections.Counter(await asyncio.gather(*(one_of_a_thousand(stubs[i % 5], i) for i in range(1000))))
        server.until(lambda held: held.balanced)
        full = [RawStream(stubs[0]) for _ in range(MAX_STREAMS)]
        for stream in full:
            await stream.open()
        refused = RawStream(stubs[0])
        code, details, _ = await refused.failure()
        assert (code, details.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STREAM_LIMIT")
        for stream in full:
            assert await stream.finish() == []
        await a_clean_stream_works(stubs[0])
    return ends


async def test_a_thousand_streams_at_once_are_served_or_refused_and_places_come_back(watched):
    before = watched.holdings()
    ends = await storm(watched)
    print(ends)
    assert ends.total() == 1000
    assert ends["served"] >= MAX_STREAMS / 2
    assert ends["refused"] > 0
    gc.collect()  # the errors of a thousand calls hold their connection
    held = watched.until(lambda held: held.balanced and held.fds <= before.fds)
    assert held.created["streams"] > before.created["streams"] + ends["served"]
