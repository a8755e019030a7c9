"""Streams that send nothing but a large mask, which they keep: there is room for some, and small ones go by."""

import grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.api import byte_budget
from raw_stream import RawStream, own_channel
from server_toml import server_toml

MB = 1 << 20
MODEL = """[[models]]
name = "one"
source = "python:mask_models:one"
task = "segmentation"
preprocess = { resize_px = 64 }"""


def masked(side):
    mask = pb.Tensor(data_type=pb.DATA_TYPE_UINT8, shape=[side, side], data=bytes(side * side))
    return {"options": pb.ExplainOptions(mask=mask)}


async def test_masks_of_streams_have_room_of_their_own(start_server, monkeypatch):
    monkeypatch.setattr(byte_budget, "_ROOM_S", 0.0)
    server = await start_server(server_toml(MODEL, max_bytes_in_flight=64 * MB))
    async with own_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        # A quarter of it is for them: 16 MB.
        kept = [RawStream(stub) for _ in range(2)]
        for stream in kept:
            await stream.open(**masked(2_800))
        refused = RawStream(stub)
        await refused.configure(**masked(2_800))
        code, details, _ = await refused.failure()
        assert (code, details.info.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BYTES_IN_FLIGHT")
        await RawStream(stub).open(**masked(64))
        await kept[0].finish()
        await RawStream(stub).open(**masked(2_800))
