"""Calls without number on one connection, and connections without number: everybody else is served as before."""

import contextlib

import grpc
import pytest

from heatlens import Client
from messages import distinct
from raw_http2 import GOAWAY, PING, RST_STREAM, SETTINGS, frame, headers
from server_process import wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

LIMIT = 256


def test_calls_beyond_the_limit_of_a_connection_are_reset_and_others_are_answered(launch, connect, sized):
    count = sized(4_000, 20_000)
    server = launch(server_toml())
    wait_settled(server.address)
    flood = connect(server.address)
    # Calls that are opened and say nothing more.
    for start in range(0, count, 500):
        flood.send(*(headers(1 + 2 * i) for i in range(start, start + 500)))
    with Client(server.address) as client:
        for image in distinct(10):
            assert client.explain(image, timeout=60).explanations
    # And some of the others, which say nothing while others wait for room.
    flood.until(RST_STREAM, count - LIMIT)


def test_pings_without_number_are_answered_and_hold_up_no_other(launch, connect, sized):
    server = launch(server_toml())
    wait_settled(server.address)
    count = sized(100_000, 400_000)
    floods = [connect(server.address) for _ in range(4)]
    for flood in floods:
        # One that does not confirm the server's settings is closed after a while.
        flood.until(SETTINGS, 1)
        flood.send(frame(SETTINGS, 1, 0), frame(PING, 0, 0, bytes(8)) * (count // 4))
    with Client(server.address) as client:
        for image in distinct(10):
            assert client.explain(image, timeout=60).explanations
    for flood in floods:
        assert flood.until(PING, count // 4)[GOAWAY] == 0


def test_connections_beyond_the_limit_are_closed_and_those_that_are_open_are_served(launch, connect, sized):
    server = launch(server_toml(max_connections=20))
    wait_settled(server.address)
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=60).explanations
        flood = [connect(server.address) for _ in range(sized(60, 600))]
        served = 0
        for one in flood:
            with contextlib.suppress(OSError, AssertionError):
                served += one.until(SETTINGS, 1)[SETTINGS] > 0
        # A few more where the first of them were idle long enough meanwhile.
        assert served >= 19
        assert client.explain(distinct(1)[0], timeout=60).explanations
        for one in flood:
            one.close()
        # Their places are free again.
        channel = grpc.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)])
        grpc.channel_ready_future(channel).result(60)
        channel.close()
