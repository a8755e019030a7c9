"""Models that misbehave: they harm themselves only."""

import asyncio
import json

import grpc
import grpc.aio
import numpy as np
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import Details, distinct, pixels
from server_process import until
from server_toml import model_toml, server_toml

TOML = server_toml(
    # Only this one is a graph: the others' Python is what is tested.
    model_toml("good", "tiny", engine=None, layers=("body", "stem")),
    model_toml("factory", "exits_in_factory"),
    model_toml("nan", "not_finite"),
    model_toml("forward", "exits_in_forward"),
    model_toml("poisonous"),
)
WHITE = np.full((64, 64, 3), 255, np.uint8)


async def explain(server, model: str, image: np.ndarray) -> pb.ExplainResponse:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        return await stub.Explain(pb.ExplainRequest(model=model, image=pixels(image)), timeout=20)


async def refusal(server, model: str, image: np.ndarray) -> tuple[grpc.StatusCode, Details]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await explain(server, model, image)
    return raised.value.code(), Details(raised.value)


async def test_factory_that_exits_and_weights_that_are_nan_fail_at_load_with_a_reason(start_server):
    server = await start_server(TOML)
    (image,) = distinct(1)
    code, details = await refusal(server, "factory", image)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "SystemExit" in details.message
    code, details = await refusal(server, "nan", image)
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "not finite" in details.message
    assert (await explain(server, "good", image)).explanations


async def test_forward_that_exits_fails_its_call_and_the_next_is_answered(start_server):
    server = await start_server(TOML)
    (image,) = distinct(1)
    for _ in range(3):
        code, details = await refusal(server, "forward", WHITE)
        assert code is grpc.StatusCode.INTERNAL
        assert "secret-exit-text" not in details.message
    assert (await explain(server, "forward", image)).explanations


async def test_internal_error_on_a_large_image_holds_nobody_up_and_keeps_the_image_out_of_the_log(launch):
    running = launch(TOML.replace("[server]", '[server]\nlog_format = "json"'))
    address = running.address
    large = np.full((1000, 1000, 3), 255, np.uint8)
    async with grpc.aio.insecure_channel(address) as channel:
        stub = explain_pb2_grpc.ExplainServiceStub(channel)
        request = pb.ExplainRequest(model="poisonous", image=pixels(large))
        async with asyncio.timeout(60):
            while True:
                with pytest.raises(grpc.aio.AioRpcError) as raised:
                    await stub.Explain(request)
                if raised.value.code() is grpc.StatusCode.INTERNAL:
                    break
                await asyncio.sleep(0.1)
    # Lines are written by a thread of their own.
    await asyncio.to_thread(until, lambda: '"INTERNAL"' in running.log())
    lines = [json.loads(line) for line in running.log().splitlines()]
    (call,) = [line for line in lines if line.get("code") == "INTERNAL"]
    assert "Traceback" in call["exception"] or "InternalError" in call["exception"]
    assert len(running.log()) < 200_000
    assert "array(" not in running.log()
