"""A server for tests of streams, on the test's own loop, and a channel to it."""

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest_asyncio

from heatlens.v1 import explain_pb2_grpc
from in_process_server import batcher_of, until

if TYPE_CHECKING:
    # Costs seconds: tests that use none of this need not wait.
    from heatlens_server.app import Server

PREPROCESS = """
preprocess = { resize_px = 64, crop_px = 64, mean = [0.485, 0.456, 0.406], std = [0.229, 0.224, 0.225] }
"""

STREAMS_TOML = f"""
[server]
listen = "127.0.0.1:0"
max_streams = 3
max_in_flight = 64
max_image_pixels = 100000
max_message_bytes = 1048576
[[models]]
name = "mlp"
source = "python:tiny_models:tiny_mlp"
engine = "torch"
layers = ["body"]
batching = {{ max_batch_size = 4 }}
{PREPROCESS}
[[models]]
name = "poisonous"
source = "python:tiny_models:poisonous"
engine = "torch"
layers = ["body"]
{PREPROCESS}
[[models]]
name = "broken"
source = "python:tiny_models:broken"
{PREPROCESS}
"""


@pytest_asyncio.fixture
async def live(start_server) -> AsyncIterator["Server"]:
    """A server on this test's loop. Whatever a test does to its streams, they give back what they took."""
    server = await start_server(STREAMS_TOML)
    yield server
    counters = server.streams.counters
    await until(lambda: counters.open == 0)
    for name, balance in dataclasses.asdict(counters).items():
        assert balance["created"] == balance["released"], name
    assert len(batcher_of(server)) == 0


@pytest_asyncio.fixture
async def channel(live: "Server") -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{live.port}", options=[("grpc.enable_retries", 0)]) as made:
        yield made


@pytest_asyncio.fixture
async def stub(channel: grpc.aio.Channel) -> explain_pb2_grpc.ExplainServiceStub:
    return explain_pb2_grpc.ExplainServiceStub(channel)
