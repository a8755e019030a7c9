"""A real server whose models are replaced and unloaded while clients call it and stream to it."""

import asyncio

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import model_pb2, model_pb2_grpc
from heatlens_server.config import ModelConfig
from messages import Details, distinct, pixels
from raw_stream import RawStream, kinds

PREPROCESS = {"resize_px": 64, "crop_px": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def config(name: str, **changes) -> ModelConfig:
    given = {"source": "python:tiny_models:tiny_mlp", "engine": "torch", "layers": ["body"], "preprocess": PREPROCESS}
    return ModelConfig(name=name, **{**given, **changes})


def request(model: str) -> pb.ExplainRequest:
    return pb.ExplainRequest(model=model, image=pixels(distinct(1)[0]))


async def refusal(call) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code(), Details(raised.value).info.reason


async def test_a_model_is_replaced_under_calls_and_streams(live, channel, stub):
    stays, stream, other = RawStream(stub), RawStream(stub), RawStream(stub)
    began = await stays.open(model="mlp")
    await stream.open(model="mlp", replacement_policy=pb.REPLACEMENT_POLICY_END)
    await other.open(model="poisonous")
    await stream.send(1, distinct(1)[0])
    assert kinds([await stream.answer()]) == [(1, "result")]
    versions: list[str] = []
    over = False

    async def keep_calling() -> None:
        while not over:
            versions.append((await stub.Explain(request("mlp"))).model_version)

    callers = [asyncio.create_task(keep_calling()) for _ in range(4)]
    await live.fleet.replace(config("mlp", version="new", batching={"max_batch_size": 5}))
    assert (await stub.Explain(request("mlp"))).model_version == "new"
    over = True
    await asyncio.gather(*callers)
    assert len(set(versions)) <= 2
    code, details, answers = await stream.failure()
    assert (code, details.info.reason, answers) == (grpc.StatusCode.UNAVAILABLE, "MODEL_REPLACED", [])
    assert details.has_retry
    await stays.send(1, distinct(1)[0])
    assert (await stays.answer()).result.model_version == began.model_version != "new"
    assert await stays.finish() == []
    reopened = RawStream(stub)
    assert (await reopened.open(model="mlp")).model_version == "new"
    for one in (reopened, other):
        await one.send(1, distinct(1)[0])
        assert kinds(await one.finish()) == [(1, "result")]
    info = await model_pb2_grpc.ModelServiceStub(channel).GetServerInfo(model_pb2.GetServerInfoRequest())
    assert info.max_batch_size == 16  # of the other models


async def test_a_model_is_unloaded_and_loaded_again(live, channel, stub):
    models, health = model_pb2_grpc.ModelServiceStub(channel), health_pb2_grpc.HealthStub(channel)

    async def listed() -> list[str]:
        return [model.name for model in (await models.ListModels(model_pb2.ListModelsRequest())).models]

    async def serving() -> str:
        service = "heatlens.v1.ExplainService/poisonous"
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    stream = RawStream(stub)
    await stream.open(model="poisonous")
    assert await listed() == ["mlp", "poisonous", "broken"]
    await live.fleet.unload("poisonous")
    code, details, _ = await stream.failure()
    assert (code, details.info.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_UNLOADED")
    assert await refusal(stub.Explain(request("poisonous"))) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
    assert (await listed(), await serving()) == (["mlp", "broken"], "SERVICE_UNKNOWN")
    await live.fleet.load(config("poisonous"))
    assert (await listed(), await serving()) == (["mlp", "broken", "poisonous"], "SERVING")
    assert (await stub.Explain(request("poisonous"))).explanations
