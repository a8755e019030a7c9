"""`server.max_connection_age_s`: clients of an old connection go elsewhere, and its streams go on."""

import asyncio

import grpc.aio

from heatlens.v1 import explain_pb2_grpc
from messages import distinct
from raw_http2 import GOAWAY, RawConnection
from raw_stream import RawStream
from server_toml import model_toml, server_toml


async def test_an_old_connection_is_told_and_its_stream_goes_on(start_server):
    server = await start_server(server_toml(model_toml("tiny"), max_connection_age_s=1.0))
    images = distinct(2)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stream = RawStream(explain_pb2_grpc.ExplainServiceStub(channel))
        await stream.open()
        await stream.send(1, images[0])
        # Younger than the stream's. It is told first that it will end, then after which call.
        connection = RawConnection(f"127.0.0.1:{server.port}")
        await asyncio.to_thread(connection.until, GOAWAY, 1)
        connection.close()
        await stream.send(2, images[1])
        answers = await stream.finish()
    assert [(answer.frame_id, answer.WhichOneof("payload")) for answer in answers] == [(1, "result"), (2, "result")]
