"""The three ways to call the server, for every test that asks for a `face`."""

import grpc.aio
import pytest

from faces import RawFace, SdkFace, SyncFace
from heatlens import AsyncClient, Client


@pytest.fixture(params=["sync", "async", "raw"])
async def face(request, server):
    if request.param == "raw":
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield RawFace(channel)
    elif request.param == "async":
        async with AsyncClient(server.address) as client:
            yield SdkFace(client)
    else:
        with Client(server.address) as client:
            yield SyncFace(client)
