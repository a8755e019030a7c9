"""One host that takes all there is: those of other hosts have their share. Strangers come from 127.0.0.2."""

import asyncio

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from in_process_server import DeviceGate, batcher_of, until
from messages import distinct, pixels
from raw_http2 import DATA, end_stream, frame, headers, message
from raw_stream import RawStream, own_channel
from server_process import wait_settled
from server_toml import model_toml, server_toml

STRANGER = "127.0.0.2"
APART = [("grpc.use_local_subchannel_pool", 1)]
HEALTH, STREAM = "/grpc.health.v1.Health/Check", "/heatlens.v1.ExplainService/StreamExplain"
MLP = model_toml("mlp", "tiny_mlp", max_batch_size=1)
PLACES = 8


async def test_a_host_that_takes_all_places_of_a_queue_gives_way(start_server, connect):
    server = await start_server(server_toml(MLP, max_queue_length=PLACES))
    address, request = f"127.0.0.1:{server.port}", pb.ExplainRequest(image=pixels(distinct(1)[0]))
    gate = DeviceGate(server)
    async with own_channel(address) as channel:
        with gate.closed():
            flood = connect(address, source=STRANGER)
            for number in range(PLACES + 2):
                stream_id = 2 * number + 1
                flood.send(headers(stream_id))
                assert await asyncio.to_thread(flood.upload, stream_id, message(request.SerializeToString()))
                flood.send(end_stream(stream_id))
            # One runs, one is stacked ahead.
            await until(lambda: len(gate.batches) == 1 and len(batcher_of(server)) == PLACES)
            stub = explain_pb2_grpc.ExplainServiceStub(channel)
            calls = [asyncio.ensure_future(stub.Explain(request)) for _ in range(PLACES // 2 + 1)]
            # Once each host has half of the places, nobody gives way.
            done, others = await asyncio.wait(calls, timeout=60, return_when=asyncio.FIRST_COMPLETED)
            assert [call.exception().code() for call in done] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
        assert all([(await call).explanations for call in others])


async def test_a_host_that_has_all_streams_gives_way(start_server, connect):
    server = await start_server(server_toml(MLP, max_streams=4))
    address = f"127.0.0.1:{server.port}"
    flood = connect(address, source=STRANGER)
    for number in range(4):
        flood.send(headers(2 * number + 1, STREAM))
    await until(lambda: server.streams.counters.streams.open == 4)
    async with own_channel(address) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        for _ in range(2):
            await RawStream(stub).open()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await RawStream(stub).open()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.serial
def test_health_checks_that_never_end_hold_up_no_other(launch, connect, sized):
    server = launch(server_toml())
    wait_settled(server.address)
    for _ in range(sized(100, 1000)):
        one = connect(server.address, source=STRANGER)
        one.send(headers(1, HEALTH))
        # The first byte of a message that does not come.
        one.send(frame(DATA, 0, 1, b"\0"))
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for _ in range(10):
            checked = stub.Check(health_pb2.HealthCheckRequest(), timeout=15)
            assert checked.status == health_pb2.HealthCheckResponse.SERVING
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=60).explanations


@pytest.mark.serial
@pytest.mark.parametrize(
    "begin",
    [b"", headers(1) + frame(DATA, 0, 1, b"\0"), headers(1, STREAM)],
    ids=["say nothing", "send no message", "are busy"],
)
def test_connections_of_a_host_that_takes_all_places_give_way(launch, connect, sized, begin):
    most = sized(40, 1000)
    server = launch(server_toml(max_connections=most))
    wait_settled(server.address)
    for _ in range(most):
        connect(server.address, source=STRANGER).send(begin)
    with grpc.insecure_channel(server.address, options=APART) as channel:
        grpc.channel_ready_future(channel).result(60)
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=60).explanations
