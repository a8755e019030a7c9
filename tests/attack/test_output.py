"""A server's log goes where nobody reads it, or nowhere: calls are answered, and SIGTERM ends it."""

import fcntl
import os

import grpc
import pytest

from heatlens.v1 import model_pb2, model_pb2_grpc
from server_process import SETTLE_TIMEOUT_S, ServerProcess
from server_toml import server_toml

TOML = server_toml(grace_s=20)
CALLS = 300


def call(address: str, times: int) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        for _ in range(times):
            assert stub.ListModels(model_pb2.ListModelsRequest(), timeout=60).models


def ends(running: ServerProcess) -> bool:
    running.process.terminate()
    return running.process.wait(SETTLE_TIMEOUT_S) == 0


@pytest.fixture
def pipe():
    """The ends of a pipe that holds one page: fewer than 30 lines."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    os.close(reader)


def test_a_log_that_nobody_reads_holds_nothing_up(launch, pipe, sized):
    _, writer = pipe
    running = launch(TOML, stderr=writer)
    os.close(writer)
    call(running.address, sized(CALLS, 10 * CALLS))
    assert ends(running)


def test_a_log_that_is_read_again_has_its_last_lines(launch, pipe):
    reader, writer = pipe
    running = launch(TOML, stderr=writer)
    os.close(writer)
    call(running.address, CALLS)
    running.process.terminate()
    log = b"".join(iter(lambda: os.read(reader, 65536), b""))
    assert running.process.wait(SETTLE_TIMEOUT_S) == 0
    assert log.count(b"ListModels") == CALLS
    assert b"stopped" in log


def test_a_log_whose_reader_is_gone(launch, sized):
    reader, writer = os.pipe()
    running = launch(TOML, stderr=writer)
    os.close(writer)
    os.close(reader)
    call(running.address, sized(CALLS, 10 * CALLS))
    assert ends(running)


def test_a_log_on_a_full_disk(launch, sized):
    full = os.open("/dev/full", os.O_WRONLY)
    running = launch(TOML, stderr=full)
    os.close(full)
    call(running.address, sized(10, 100))
    assert ends(running)
