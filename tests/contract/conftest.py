"""The three ways to call the server, for every test that asks for a `caller`."""

import grpc.aio
import pytest

from callers import AsyncCaller, RawCaller
from heatlens import AsyncClient, Client
from stream_adapters import SyncClientAdapter


@pytest.fixture(params=["sync", "async", "raw"])
async def caller(request, server):
    if request.param == "raw":
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield RawCaller(channel)
    elif request.param == "async":
        async with AsyncClient(server.address) as client:
            yield AsyncCaller(client)
    else:
        with Client(server.address) as client:
            yield AsyncCaller(SyncClientAdapter(client))
