"""More callers than a server has places for: they are refused by their headers, whatever they would send."""

import asyncio

import grpc
import grpc.aio
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from in_process_server import DeviceGate, batcher_of, until
from messages import Details, distinct, pixels
from raw_http2 import HEADERS, headers
from server_toml import model_toml, server_toml

PLACES = 4


async def test_a_full_server_refuses_before_it_reads_a_message(start_server, connect, sized):
    server = await start_server(
        server_toml(model_toml("mlp", "tiny_mlp", layers=("body",), max_batch_size=1), max_queue_length=PLACES)
    )
    address, request = f"127.0.0.1:{server.port}", pb.ExplainRequest(image=pixels(distinct(1)[0]))
    gate = DeviceGate(server)
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)]) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        with gate.closed():
            # One runs, one is stacked ahead.
            calls = [stub.Explain(request) for _ in range(2)]
            await until(lambda: len(gate.batches) == 1 and len(batcher_of(server)) == 0)
            calls += [stub.Explain(request) for _ in range(PLACES)]
            await until(lambda: len(batcher_of(server)) == PLACES)
            flood = connect(address)
            count = sized(50, 200)
            for number in range(count):
                flood.send(headers(2 * number + 1))
            # Each is answered, though none sends a message.
            await asyncio.to_thread(flood.until, HEADERS, count)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Explain(request)
            told = Details(refused.value)
            assert (refused.value.code(), told.info.reason, told.has_retry) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "QUEUE_FULL",
                True,
            )
        assert all([(await call).explanations for call in calls])
