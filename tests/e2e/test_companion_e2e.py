"""Torch beside onnxruntime, and explanations in steps, behind a real server: who is answered when, and by what."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import numpy as np
import pytest
import pytest_asyncio

import tiny_models
from heatlens import Client, DeadlineExceededError
from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2
from in_process_server import batcher_of, engine_of, until
from messages import Details, distinct, map_of, pixels
from queue_engines import EachRun
from raw_stream import PATIENCE_S, RawStream, kinds
from server_process import wait_settled
from server_toml import model_toml, server_toml

if TYPE_CHECKING:
    # Costs seconds: what needs a process only need not wait.
    from heatlens_server.app import Server

MODELS = [
    model_toml(engine, "tiny", engine=engine, layers=("body", "stem"), max_batch_size=2)
    for engine in ("onnxruntime", "torch")
]
MODEL = "onnxruntime"
NEEDS_TORCH = {"method": method_pb2.METHOD_SHAPLEY_CAM}
SLOW = {"method": method_pb2.METHOD_SCORE_CAM}


def test_torch_comes_when_it_is_needed_and_others_are_answered_meanwhile(launch, server, chelsea):
    running = launch(server_toml())
    wait_settled(running.address)
    with Client(running.address) as client, Client(server.address) as reference:
        (model,) = client.models()
        assert model.method_engines["grad-cam"] == "onnxruntime"
        assert model.method_engines["finer-cam"] == "onnxruntime"
        assert model.method_engines["shapley-cam"] == "torch"
        assert "score-cam" in model.methods_in_steps
        client.explain(chelsea)
        assert not running.has_torch()
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(client.explain, chelsea, method="shapley-cam") for _ in range(2)]
            answered = 0
            # Paced: calls without a pause would take the processors that torch is loaded with.
            while not wait(waiting, timeout=0.1, return_when=FIRST_COMPLETED).done:
                client.explain(chelsea)
                answered += 1
        assert answered > 1
        assert running.has_torch()
        assert running.log().count("torch was loaded beside onnxruntime") == 1
        expected = reference.explain(chelsea, model="efficientnet_lite0", method="shapley-cam").explanations[0]
        assert expected.heatmap.values.max() == 1
        for call in waiting:
            found = call.result().explanations[0]
            assert (found.class_id, found.label) == (expected.class_id, expected.label)
            np.testing.assert_allclose(found.heatmap.values, expected.heatmap.values, atol=1e-3)
        # Seconds of work, which nobody waits for any more.
        with pytest.raises(DeadlineExceededError):
            client.explain(chelsea, method="score-cam", timeout=0.5)
        assert client.explain(chelsea).explanations


class Gate:
    """Holds every step of a model, which is one run, until it is let go.

    Attributes:
        taken: steps that were begun.
        live: explanations that hold something.
    """

    def __init__(self, server: "Server") -> None:
        self.taken = self.live = 0
        batcher_of(server, MODEL).pace = EachRun()
        self._tickets = threading.Semaphore(0)
        engine = engine_of(server, MODEL)
        steps = engine.steps

        def gated(*args, **kwargs):
            self.live += 1
            try:
                inner = steps(*args, **kwargs)
                while True:
                    self.taken += 1
                    assert self._tickets.acquire(timeout=PATIENCE_S)
                    try:
                        next(inner)
                    except StopIteration as stop:
                        return stop.value
                    yield
            finally:
                self.live -= 1

        engine.steps = gated

    def release(self, count: int = 1) -> None:
        self._tickets.release(count)


@pytest_asyncio.fixture
async def live(start_server) -> "Server":
    return await start_server(server_toml(*MODELS))


@pytest_asyncio.fixture
async def stub(live: "Server") -> AsyncIterator[explain_pb2_grpc.ExplainServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{live.port}", options=[("grpc.enable_retries", 0)]) as channel:
        yield explain_pb2_grpc.ExplainServiceStub(channel)


IMAGE = distinct(1)[0]


def request(model: str = MODEL, **options) -> pb.ExplainRequest:
    return pb.ExplainRequest(model=model, image=pixels(IMAGE), options=pb.ExplainOptions(**options))


async def test_both_engines_say_the_same_of_every_method_and_option(live, stub):
    capabilities = live.fleet.get(MODEL).capabilities
    assert capabilities.engine_name == "onnxruntime"
    assert capabilities.requestable_methods == live.fleet.get("torch").capabilities.requestable_methods
    options = [{"method": method} for method in method_pb2.Method.values() if method]
    options = [one for one in options if _name(one["method"]) in capabilities.requestable_methods]
    assert len(options) >= 12
    options += [
        {"target_score": method_pb2.TARGET_SCORE_CONTRAST},
        {"smoothing": pb.Smoothing(augmentation=True)},
        {"layers": ["body", "stem"], "aggregation": method_pb2.AGGREGATION_PRODUCT},
        {"layers": ["stem"], "method": method_pb2.METHOD_EIGEN_CAM},
    ]
    for one in options:
        answers = [await stub.Explain(request(model, **one, top_predictions=3)) for model in (MODEL, "torch")]
        found, expected = (answer.explanations[0] for answer in answers)
        assert found.class_id == expected.class_id
        np.testing.assert_allclose(map_of(found), map_of(expected), atol=1e-3, err_msg=str(one))
        assert answers[0].predictions[0].logit == pytest.approx(answers[1].predictions[0].logit, abs=1e-4)


def _name(method: int) -> str:
    return method_pb2.Method.Name(method).removeprefix("METHOD_").lower().replace("_", "-")


async def test_a_batch_is_answered_between_two_steps(live, stub):
    await stub.Explain(request(**NEEDS_TORCH))
    gate = Gate(live)
    slow = asyncio.create_task(_explain(stub, **SLOW))
    await until(lambda: gate.taken == 1)
    batcher = batcher_of(live, MODEL)
    put, queued = batcher.put, []
    batcher.put = lambda *args: (put(*args), queued.append(args))
    fast = asyncio.create_task(_explain(stub))
    await until(lambda: queued and len(batcher) == 0)
    gate.release()
    assert (await fast).explanations
    await until(lambda: gate.taken == 2)
    assert not slow.done()
    gate.release(1000)
    answer = await slow
    assert (answer.timing.batch_size, map_of(answer.explanations[0]).max()) == (1, 1)
    assert gate.taken > 3
    assert gate.live == 0


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_caller_who_leaves_half_way_frees_the_device(live, stub, how):
    await stub.Explain(request(**NEEDS_TORCH))
    gate = Gate(live)
    call = stub.Explain(request(**SLOW), timeout=0.3 if how == "deadline" else None)
    waiting = asyncio.create_task(_result(call))
    await until(lambda: gate.taken == 1)
    gate.release()
    await until(lambda: gate.taken == 2)
    assert gate.live == 1
    if how == "cancel":
        call.cancel()
    with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
        await waiting
    # The server hears of it some time; the step that runs is the last one.
    entry = batcher_of(live, MODEL)
    await until(lambda: not live._gate._in_flight)
    gate.release()
    await until(lambda: gate.live == 0)
    assert gate.taken == 2
    assert len(entry) == 0
    assert (await _explain(stub)).explanations


async def test_frames_in_steps_are_answered_in_order(live, stub):
    stream = RawStream(stub)
    options = pb.ExplainOptions(**SLOW)
    await stream.open(model=MODEL, options=options, max_in_flight=4)
    images = distinct(6)
    for i, image in enumerate(images):
        await stream.send(i + 1, image)
    answers = await stream.finish()
    assert kinds(answers) == [(i + 1, "result") for i in range(6)]
    for image, answer in zip(images, answers, strict=True):
        alone = await stub.Explain(pb.ExplainRequest(model="torch", image=pixels(image), options=options))
        np.testing.assert_allclose(map_of(answer.result.explanations[0]), map_of(alone.explanations[0]), atol=1e-3)


async def test_a_companion_that_cannot_be_loaded_fails_those_who_need_it_alone(live, stub, monkeypatch):
    with monkeypatch.context() as context:
        context.setattr(tiny_models, "tiny", tiny_models.tiny_mlp)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await _explain(stub, **NEEDS_TORCH)
        details = Details(raised.value)
        assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert details.info.reason == "COMPANION_FAILED"
        assert "other weights" in details.message
        stream = RawStream(stub)
        await stream.configure(model=MODEL, options=pb.ExplainOptions(**NEEDS_TORCH))
        code, details, answers = await stream.failure()
        assert (code, details.info.reason, answers) == (grpc.StatusCode.FAILED_PRECONDITION, "COMPANION_FAILED", [])
        assert (await _explain(stub)).explanations
    assert (await _explain(stub, **NEEDS_TORCH)).explanations


async def _explain(stub: explain_pb2_grpc.ExplainServiceStub, **options) -> pb.ExplainResponse:
    return await _result(stub.Explain(request(**options)))


async def _result(call) -> pb.ExplainResponse:
    return await call
