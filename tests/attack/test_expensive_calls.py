"""Calls that take long: others have the device between two steps, and nothing runs for callers that are gone."""

import threading
import time

import grpc
import grpc.aio
import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from heatlens_server.core.engine import MapSpec
from heatlens_server.scheduling.pace import STEP_S
from in_process_server import PATIENCE_S, batcher_of, engine_of, until
from messages import distinct, pixels
from server_toml import model_toml, server_toml

CLASSES = 10
RUN_S = 0.6 * STEP_S


class Record:
    """What an engine runs, in order: "run", of a step, or "batch". While it is held, steps wait inside the engine.

    A run takes `RUN_S`, as if the model were large: one is a step, then, while others wait.
    """

    def __init__(self, engine) -> None:
        self.ran: list[str] = []
        self.go = threading.Event()
        self.go.set()
        steps, explain = engine.steps, engine.explain

        def recorded_steps(image: np.ndarray, target: object, spec: MapSpec, *, rows: int):
            run = steps(image, target, spec, rows=rows)
            while True:
                self.ran.append("run")
                assert self.go.wait(PATIENCE_S)
                time.sleep(RUN_S)
                try:
                    next(run)
                except StopIteration as stop:
                    return stop.value
                yield

        def recorded_batch(*batch):
            self.ran.append("batch")
            return explain(*batch)

        engine.steps, engine.explain = recorded_steps, recorded_batch


EXPENSIVE = {
    "full-grad": pb.ExplainOptions(method=method_pb2.METHOD_FULL_GRAD, top_k=CLASSES),
    "guided-grad-cam": pb.ExplainOptions(method=method_pb2.METHOD_GUIDED_GRAD_CAM, top_k=CLASSES),
    "grad-cam of many classes": pb.ExplainOptions(top_k=CLASSES),
    "two layers, augmented": pb.ExplainOptions(
        top_k=CLASSES, layers=["body", "stem"], smoothing=pb.Smoothing(augmentation=True)
    ),
}


@pytest.mark.parametrize("options", EXPENSIVE.values(), ids=EXPENSIVE)
async def test_others_wait_for_one_step_and_nothing_runs_for_callers_that_left(start_server, sized, options):
    server = await start_server(
        server_toml(model_toml("mlp", "tiny_mlp", layers=("body", "stem")), max_queue_length=100)
    )
    record = Record(engine_of(server))
    image = pixels(distinct(1)[0])
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        record.go.clear()
        count = sized(8, 64)
        calls = [stub.Explain(pb.ExplainRequest(image=image, options=options)) for _ in range(count)]
        await until(lambda: record.ran == ["run"] and len(batcher_of(server)) == count - 1)
        plain = stub.Explain(pb.ExplainRequest(image=image))
        batcher = batcher_of(server)
        # It waits, or was claimed ahead already.
        await until(lambda: len(batcher) == count or batcher._batches_ahead)
        record.go.set()
        await plain
        before = record.ran[: record.ran.index("batch")]
        # The one that ran, and one that was claimed ahead.
        assert len(before) <= 2
        for call in calls:
            call.cancel()
        await until(lambda: len(batcher_of(server)) == 0)
        ran = record.ran.count("run")
        for _ in range(3):
            await stub.Explain(pb.ExplainRequest(image=image))
        assert record.ran.count("run") <= ran + 1
        # Ten goals, and what a step each of them is: not all at once.
        assert ran < count * CLASSES


async def test_an_explanation_in_steps_is_the_same_as_that_in_one_go(start_server):
    server = await start_server(server_toml(model_toml("mlp", "tiny_mlp")))
    record = Record(engine_of(server))
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
            assert record.ran == ["batch"] * CLASSES
