"""Bytes that are sent without a right to, or never taken: memory stays bounded, and everybody else is answered."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from heatlens import Client
from heatlens.v1 import explain_pb2 as pb
from messages import distinct
from observed_server import rss_bytes
from raw_http2 import EXPLAIN, end_stream, headers, message
from server_process import until, wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

MB = 1 << 20
HEALTH = "/grpc.health.v1.Health/Check"


@pytest.mark.parametrize("method", [EXPLAIN, HEALTH])
def test_without_a_token_no_message_is_held(launch, connect, sized, method):
    server = launch(server_toml(token="s3cret"))
    wait_settled(server.address, token="s3cret")
    image = distinct(1)[0]
    with Client(server.address, token="s3cret") as client:
        assert client.explain(image, timeout=60).explanations
        before = rss_bytes(server.process.pid)
        # All but the last byte of the largest message that there may be.
        data = message(bytes(16 * MB))[:-1]
        peers = [connect(server.address) for _ in range(sized(30, 1000))]
        sent = 0
        for peer in peers:
            peer.send(headers(1, method))
            sent += peer.upload(1, data, patience_s=0.2)
        # Of health checks, which anybody may make, a few messages are awaited at a time.
        assert sent == 0 or method == HEALTH
        assert rss_bytes(server.process.pid, peak=True) - before < 200 * MB
        assert client.health() == "serving"
        assert client.explain(image, timeout=60).explanations


def test_answers_that_nobody_takes_are_bounded_and_their_connection_is_closed(launch, connect, sized):
    budget = 256 * MB
    server = launch(server_toml(max_bytes_in_flight=budget))
    wait_settled(server.address)
    file = io.BytesIO()
    Image.fromarray(np.zeros((1900, 1900, 3), np.uint8)).save(file, "PNG")
    # 25 kB, and an answer of 14 MB.
    request = pb.ExplainRequest(
        image=pb.Image(encoded=file.getvalue()), options=pb.ExplainOptions(map_size=pb.MAP_SIZE_SOURCE)
    ).SerializeToString()
    with Client(server.address) as client:
        for image in distinct(4):
            assert client.explain(image, timeout=60).explanations
        before = rss_bytes(server.process.pid)
        thief = connect(server.address, timeout_s=60)
        for call in range(sized(24, 105)):
            stream_id = 1 + 2 * call
            thief.send(headers(stream_id))
            assert thief.upload(stream_id, message(request), patience_s=60)
            thief.send(end_stream(stream_id))
        for image in distinct(20):
            assert client.explain(image, timeout=60).explanations
        thief.socket.settimeout(60)
        while thief.socket.recv(MB):
            pass  # the rest of what it was granted, until it is hung up on
        assert rss_bytes(server.process.pid, peak=True) - before < 2 * budget
        assert client.explain(distinct(1)[0], timeout=60).explanations


def test_memory_comes_back_after_a_burst(launch):
    server = launch(server_toml())
    wait_settled(server.address)
    image = np.zeros((1900, 1900, 3), np.uint8)
    with Client(server.address) as client:
        for small in distinct(4):
            client.explain(small, timeout=60)
        idle = rss_bytes(server.process.pid)
        with ThreadPoolExecutor(8) as threads:
            answers = [threads.submit(client.explain, image, map_size="source", timeout=100) for _ in range(8)]
            assert all(answer.result().explanations for answer in answers)
        assert rss_bytes(server.process.pid, peak=True) > 1.5 * idle  # this can fail
        until(lambda: rss_bytes(server.process.pid) < 1.5 * idle)
