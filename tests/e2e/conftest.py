"""The `heatlens` command in this process; and a server for tests of streams, on the test's own loop."""

import dataclasses
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from typer.testing import CliRunner

from heatlens._cli.commands import app
from heatlens.v1 import explain_pb2_grpc
from in_process_server import batcher_of, until
from server_toml import model_toml, server_toml

if TYPE_CHECKING:
    # Costs seconds: tests that use none of this need not wait.
    from heatlens_server.app import Server

STREAMS_TOML = server_toml(
    model_toml("mlp", "tiny_mlp", max_batch_size=4),
    model_toml("poisonous"),
    model_toml("broken"),
    max_streams=3,
    max_in_flight=64,
    max_image_pixels=100_000,
    max_message_bytes=1_048_576,
)


@pytest.fixture
def run(monkeypatch):
    """Run `heatlens` in this process; stdout and stderr apart."""
    for name in ("HEATLENS_ADDRESS", "HEATLENS_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, exit_code=0):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == exit_code, done.output
        return done

    return run


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
