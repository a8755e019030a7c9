"""Calls that take long: others have the device between two steps, and nothing runs for callers that are gone."""

import time
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.scheduling.entry import Entry
from heatlens_server.scheduling.pace import STEP_S
from in_process_server import batcher_of, engine_of, until
from messages import distinct, pixels
from server_toml import model_toml, server_toml

if TYPE_CHECKING:
    from heatlens_server.app import Server

CLASSES = 10
RUN_S = 0.6 * STEP_S
PLAIN = 5


class Record:
    """What a model does, in order: "plain waits", for its batch, "batch", and "run", of a step.

    A run takes `RUN_S`, as if the model were large: one is a step, then, while others wait.
    """

    def __init__(self, server: "Server") -> None:
        self.ran: list[str] = []
        engine, batcher = engine_of(server), batcher_of(server)
        steps, explain, put = engine.steps, engine.explain, batcher.put

        def recorded_steps(image: np.ndarray, target: object, spec: MapSpec, *, rows: int):
            run = steps(image, target, spec, rows=rows)
            while True:
                self.ran.append("run")
                time.sleep(RUN_S)
                try:
                    next(run)
                except StopIteration as stop:
                    return stop.value
                yield

        def recorded_batch(*batch):
            self.ran.append("batch")
            return explain(*batch)

        def recorded_put(entry: Entry, fitted: FittedImage) -> None:
            if entry.target.count == 1:
                self.ran.append("plain waits")
            put(entry, fitted)

        engine.steps, engine.explain, batcher.put = recorded_steps, recorded_batch, recorded_put


EXPENSIVE = {
    "full-grad": pb.ExplainOptions(method=method_pb2.METHOD_FULL_GRAD, top_k=CLASSES),
    "guided-grad-cam": pb.ExplainOptions(method=method_pb2.METHOD_GUIDED_GRAD_CAM, top_k=CLASSES),
    "shapley-cam": pb.ExplainOptions(method=method_pb2.METHOD_SHAPLEY_CAM, top_k=CLASSES // 3, layers=["body", "stem"]),
    "grad-cam of many classes": pb.ExplainOptions(top_k=CLASSES),
    "two layers, augmented": pb.ExplainOptions(
        top_k=CLASSES, layers=["body", "stem"], smoothing=pb.Smoothing(augmentation=True)
    ),
}


@pytest.mark.parametrize("options", EXPENSIVE.values(), ids=EXPENSIVE)
async def test_others_wait_for_two_steps_and_nothing_runs_for_callers_that_left(start_server, sized, options):
    server = await start_server(
        server_toml(model_toml("mlp", "tiny_mlp", layers=("body", "stem")), max_queue_length=100)
    )
    record = Record(server)
    image = pixels(distinct(1)[0])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        count = sized(16, 64)
        calls = [stub.Explain(pb.ExplainRequest(image=image, options=options)) for _ in range(count)]
        await until(lambda: record.ran.count("run") > 1 and len(batcher_of(server)) >= count - 2)
        for _ in range(PLAIN):
            await stub.Explain(pb.ExplainRequest(image=image))
        waits = " ".join(record.ran).split("plain waits")[1:]
        assert len(waits) == PLAIN
        # The one that ran, and one that was claimed ahead.
        assert max(wait.split("batch")[0].count("run") for wait in waits) <= 2
        for call in calls:
            call.cancel()
        await until(lambda: len(batcher_of(server)) == 0)
        ran = record.ran.count("run")
        for _ in range(3):
            await stub.Explain(pb.ExplainRequest(image=image))
        assert record.ran.count("run") <= ran + 1
        # Ten goals of each caller, and what a run each of them is: not all were made.
        assert ran < count * CLASSES


async def test_an_explanation_in_steps_is_the_same_as_that_in_one_go(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp")))
    record = Record(server)
    image = pixels(distinct(1)[0])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        for method in (method_pb2.METHOD_FULL_GRAD, method_pb2.METHOD_GUIDED_GRAD_CAM, method_pb2.METHOD_GRAD_CAM):

            async def explained(ids: list[int], method: int = method):
                options = pb.ExplainOptions(method=method, class_ids=pb.ClassIds(values=ids))
                answer = await stub.Explain(pb.ExplainRequest(image=image, options=options))
                return {one.class_id: np.frombuffer(one.map.data, "<f4") for one in answer.explanations}

            record.ran.clear()
            together = await explained(list(range(CLASSES)))
            assert record.ran.count("run") >= CLASSES
            record.ran.clear()
            for class_id in together:
                alone = await explained([class_id])
                np.testing.assert_allclose(together[class_id], alone[class_id], atol=1e-5)
            ran = [one for one in record.ran if one != "plain waits"]
            # What differentiates by the whole network, in runs that take as long as these, shares no batch.
            assert set(ran) == {"batch" if method == method_pb2.METHOD_GRAD_CAM else "run"}
