"""StreamExplain without the SDK: a stream that is written and read message by message."""

import asyncio

import grpc.aio
import numpy as np
from google.rpc import status_pb2

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import Details, distinct, pixels

PATIENCE_S = 20
IMAGE = distinct(1)[0]


def own_channel(address: str) -> grpc.aio.Channel:
    """A connection that no other channel of this process shares, and calls that are made once."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
    return grpc.aio.insecure_channel(address, options=options)


class RawStream:
    """One stream. Everything waits for PATIENCE_S at most."""

    def __init__(self, stub: explain_pb2_grpc.ExplainServiceStub, **call) -> None:
        self.call = stub.StreamExplain(**call)

    @classmethod
    def of_bytes(cls, channel: grpc.aio.Channel) -> "RawStream":
        """A stream whose `write_bytes` sends what no stub would."""
        stream = cls.__new__(cls)
        stream.call = channel.stream_stream(
            "/heatlens.v1.ExplainService/StreamExplain", response_deserializer=pb.StreamExplainResponse.FromString
        )()
        return stream

    async def open(self, **config) -> pb.StreamStarted:
        """Send the configuration and read the first answer."""
        await self.configure(**config)
        first = await self.answer()
        assert (first.frame_id, first.WhichOneof("payload")) == (0, "started")
        return first.started

    async def configure(self, **config) -> None:
        await self.write(pb.StreamExplainRequest(config=pb.StreamConfig(**config)))

    async def send(self, frame_id: int, image: "np.ndarray | pb.Image | None" = None, **frame) -> None:
        sent = pixels(image) if isinstance(image, np.ndarray) else image
        await self.write(pb.StreamExplainRequest(frame=pb.Frame(frame_id=frame_id, image=sent, **frame)))

    async def write(self, request: pb.StreamExplainRequest) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self.call.write(request)

    async def answer(self) -> pb.StreamExplainResponse:
        async with asyncio.timeout(PATIENCE_S):
            response = await self.call.read()
        assert response is not grpc.aio.EOF
        return response

    async def answers(self, count: int) -> list[pb.StreamExplainResponse]:
        return [await self.answer() for _ in range(count)]

    async def finish(self) -> list[pb.StreamExplainResponse]:
        """Half-close; all answers that are left. The stream must end well."""
        await self.call.done_writing()
        left = []
        async with asyncio.timeout(PATIENCE_S):
            while (response := await self.call.read()) is not grpc.aio.EOF:
                left.append(response)
            assert await self.call.code() is grpc.StatusCode.OK
        return left

    async def failure(self) -> tuple[grpc.StatusCode, Details | None, list[pb.StreamExplainResponse]]:
        """How the stream failed, and the answers before that."""
        left = []
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (response := await self.call.read()) is not grpc.aio.EOF:
                    left.append(response)
        except grpc.aio.AioRpcError as error:
            return error.code(), Details.of(error), left
        raise AssertionError("the stream ended well")


def kinds(responses: list[pb.StreamExplainResponse]) -> list[tuple[int, str]]:
    """Frame ids, with what was answered: "result", "skipped" or the code's name."""
    return [(r.frame_id, _kind(r)) for r in responses]


def _kind(response: pb.StreamExplainResponse) -> str:
    payload = response.WhichOneof("payload")
    if payload != "error":
        return payload
    (code,) = [code for code in grpc.StatusCode if code.value[0] == response.error.code]
    return code.name


def status_details(response: pb.StreamExplainResponse) -> Details:
    """The details of an error in band."""
    return Details(_InBand(response.error))


class _InBand(grpc.RpcError):
    def __init__(self, status: status_pb2.Status) -> None:
        self._status = status

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


async def a_clean_stream_works(
    stub: explain_pb2_grpc.ExplainServiceStub, count: int = 12, *, image: np.ndarray = IMAGE
) -> None:
    """Whatever happened before, a stream is answered."""
    stream = RawStream(stub)
    await stream.open()
    for i in range(count):
        await stream.send(i, image)
    assert kinds(await stream.finish()) == [(i, "result") for i in range(count)]
