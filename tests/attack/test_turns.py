"""Hundreds of calls of one stranger: other connections have their turn in every batch."""

import asyncio
import threading

import grpc
import grpc.aio

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from heatlens_server.core.targets import ClassIds
from in_process_server import batcher_of, engine_of, until
from messages import distinct, pixels
from server_toml import model_toml, server_toml

BATCH = 4

_APART = [("grpc.use_local_subchannel_pool", 1)]


async def test_a_connection_with_hundreds_of_calls_holds_up_no_other(start_server, sized):
    count = sized(60, 250)
    server = await start_server(
        server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=4), max_queue_length=count + 2)
    )
    engine, batcher = engine_of(server), batcher_of(server)
    ran: list[str] = []
    gate, explain = threading.Event(), engine.explain

    def recorded(images, targets, spec):
        assert gate.wait(60)
        ran.extend("other" if isinstance(target, ClassIds) else "stranger" for target in targets)
        return explain(images, targets, spec)

    arrived: list[object] = []
    put = batcher.put

    def recorded_put(entry, fitted):
        arrived.append(entry)
        put(entry, fitted)

    engine.explain, batcher.put = recorded, recorded_put
    address, image = f"127.0.0.1:{server.port}", pixels(distinct(1)[0])
    others = pb.ExplainOptions(class_ids=pb.ClassIds(values=[1]))
    async with (
        grpc.aio.insecure_channel(address, options=_APART) as stranger,
        grpc.aio.insecure_channel(address, options=_APART) as other,
    ):
        flood = [
            explain_pb2_grpc.ExplainServiceStub(stranger).Explain(pb.ExplainRequest(image=image), timeout=120)
            for _ in range(count)
        ]
        flooding = asyncio.gather(*flood)
        await until(lambda: len(arrived) == count)
        call = explain_pb2_grpc.ExplainServiceStub(other).Explain(
            pb.ExplainRequest(image=image, options=others), timeout=120
        )
        answering = asyncio.ensure_future(call)
        await until(lambda: len(arrived) == count + 1)
        gate.set()
        assert (await answering).explanations
        await flooding
    # It waits for the batch that runs and the one that is formed, and is in the next.
    assert ran.index("other") < 3 * BATCH
    assert ran.count("stranger") == count
