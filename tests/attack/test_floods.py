"""Frames and calls without number from one host: it is cut off, and others are served. It comes from 127.0.0.2."""

import socket
import threading
import time

import grpc
import pytest

from floods import END_STREAM, KINDS, STRANGER, drain, endless, flood
from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import distinct
from raw_http2 import DATA, HEADERS, SETTINGS, RawConnection, frame, headers, message
from server_process import until, wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

CONNECTIONS = 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_floods_is_cut_off_and_others_are_served(launch, kind):
    server = launch(server_toml())
    wait_settled(server.address)
    over = threading.Event()
    threads = [
        threading.Thread(target=flood, args=(server.address, kind, over), daemon=True) for _ in range(CONNECTIONS)
    ]
    for thread in threads:
        thread.start()
    until(lambda: f"{STRANGER} floods" in server.log())
    host, _, port = server.address.rpartition(":")
    with pytest.raises(TimeoutError):
        socket.create_connection((host, int(port)), timeout=0.5, source_address=(STRANGER, 0))
    with Client(server.address) as client:
        for image in distinct(10):
            assert client.explain(image, timeout=60).explanations
    over.set()
    for thread in threads:
        thread.join(20)


def test_large_uploads_calls_that_are_cancelled_and_short_deadlines_are_no_flood(launch, sized):
    server = launch(server_toml())
    wait_settled(server.address)
    large = pb.ExplainRequest(image=pb.Image(encoded=bytes(15 << 20)))
    with grpc.insecure_channel(server.address) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        for _ in range(sized(10, 100)):
            assert stub.Explain.future(large).code() is grpc.StatusCode.INVALID_ARGUMENT
            stub.Explain.future(large).cancel()
            for _ in range(10):
                stub.Explain.future(large, timeout=0.001).code()
    with Client(server.address) as client:
        until_s = time.monotonic() + 2  # some looks at what came
        while time.monotonic() < until_s:
            assert client.explain(distinct(1)[0], timeout=60).explanations
    assert "floods" not in server.log()


def test_calls_of_one_host_that_are_refused_for_what_they_ask_come_so_many_a_second(launch):
    server = launch(server_toml())
    wait_settled(server.address)
    count = 250  # of one connection, which others are reset of
    wrong = message(pb.ExplainRequest(model="nobody's").SerializeToString())
    peers = [RawConnection(server.address, source=STRANGER) for _ in range(3)]
    since_s = time.monotonic()
    for number, peer in enumerate(peers):
        sent = wrong if number else b""  # those of the first one have no message
        calls_ = (headers(call) + frame(DATA, END_STREAM, call, sent) for call in range(1, 2 * count, 2))
        peer.send(frame(SETTINGS, 1, 0), *calls_)
    with Client(server.address) as client:
        for image in distinct(10):
            assert client.explain(image, timeout=60).explanations
    for peer in peers:
        peer.until(HEADERS, count)
    assert time.monotonic() - since_s > (len(peers) * count - 400) / 200 - 0.1
    assert "floods" not in server.log()
    for peer in peers:
        peer.close()


def test_it_can_be_turned_off(launch):
    server = launch(server_toml(refuse_floods=False))
    wait_settled(server.address)
    peer = RawConnection(server.address, source=STRANGER)
    pieces = endless("pings")
    peer.until(SETTINGS, 1)
    peer.send(frame(SETTINGS, 1, 0))
    threading.Thread(target=drain, args=(peer.socket,), daemon=True).start()
    for _ in range(1000):
        peer.send(next(pieces))
    with Client(server.address) as client:
        assert client.explain(distinct(1)[0], timeout=60).explanations
    peer.close()
    assert "floods" not in server.log()
