"""Messages of millions of elements: refused before protobuf makes an object of each, while others are answered."""

import grpc
import psutil
import pytest

from heatlens import Client
from messages import Details, distinct
from observed_server import rss_bytes
from server_process import wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

MB = 2**20
SIZE = 15 * MB


def field(number, content):
    """A field of bytes, its length as a varint of four bytes."""
    size = len(content)
    return (
        bytes([number << 3 | 2, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14 & 0x7F | 0x80, size >> 21])
        + content
    )


EXPLAIN, INFER = "/heatlens.v1.ExplainService/Explain", "/inference.GRPCInferenceService/ModelInfer"
BOMBS = {
    "metrics": (EXPLAIN, field(3, field(11, field(1, b"\x01" * SIZE)))),
    "labels": (EXPLAIN, field(3, field(3, b"\x12\x00" * (SIZE // 2)))),
    "shape": (EXPLAIN, field(2, field(2, field(2, b"\x01" * SIZE)))),
    "contents": (INFER, field(5, field(5, field(4, b"\x01" * SIZE)))),
}


@pytest.mark.parametrize(("method", "bomb"), BOMBS.values(), ids=BOMBS.keys())
def test_bombs_cost_no_more_than_their_bytes(launch, sized, method, bomb):
    server = launch(server_toml())
    wait_settled(server.address)
    with Client(server.address) as client, grpc.insecure_channel(server.address) as channel:
        client.explain(distinct(1)[0], timeout=60)
        before, process = rss_bytes(server.process.pid), psutil.Process(server.process.pid)
        used = process.cpu_times().user
        count = sized(8, 16)
        send = channel.unary_unary(method)
        calls = [send.future(bomb, timeout=100) for _ in range(count)]
        assert client.explain(distinct(1)[0], timeout=60).explanations
        for call in calls:
            error = call.exception()
            assert (error.code(), Details(error).info.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "MESSAGE_TOO_COMPLEX",
            )
        # Parsing one takes 60 to 250 MB and 0.2 to 1 s of user time beyond that of its bytes.
        assert rss_bytes(server.process.pid, peak=True) - before < 3 * count * SIZE
        assert process.cpu_times().user - used < 0.1 * count + 0.5
