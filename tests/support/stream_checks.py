"""What several tests of streams do to a server."""

import grpc
import grpc.aio
import numpy as np

from heatlens.v1 import explain_pb2_grpc
from raw_stream import RawStream, kinds
from wire import distinct

IMAGE = distinct(1)[0]


def own_channel(address: str) -> grpc.aio.Channel:
    """A connection that no other channel of this process shares, and calls that are made once."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.aio.insecure_channel(address, options=options)


async def a_clean_stream_works(
    stub: explain_pb2_grpc.ExplainServiceStub, count: int = 12, *, image: np.ndarray = IMAGE
) -> None:
    """Whatever happened before, a stream is answered."""
    stream = RawStream(stub)
    await stream.open()
    for i in range(count):
        await stream.send(i, image)
    assert kinds(await stream.finish()) == [(i, "result") for i in range(count)]
