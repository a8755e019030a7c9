"""A model that does not return: its callers are told, others are answered, and the log says where it stands."""

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, model_pb2, model_pb2_grpc
from messages import Details, distinct, pixels
from server_process import SETTLE_TIMEOUT_S, until, wait_settled
from server_toml import model_toml, server_toml

HANG_AFTER_S = 3
SLOW = model_toml("slow") + f"\nhang_after_s = {HANG_AFTER_S}"
IMAGE = pixels(distinct(1)[0])
READY, UNAVAILABLE = model_pb2.Model.STATE_READY, model_pb2.Model.STATE_UNAVAILABLE
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def explain(address: str, model: str) -> pb.ExplainResponse:
    with grpc.insecure_channel(address) as channel:
        return explain_pb2_grpc.ExplainServiceStub(channel).Explain(pb.ExplainRequest(model=model, image=IMAGE))


def state(address: str, model: str) -> tuple[int, int]:
    """A model's state in ListModels and in health."""
    with grpc.insecure_channel(address) as channel:
        asked = health_pb2.HealthCheckRequest(service=f"heatlens.v1.ExplainService/{model}")
        health = health_pb2_grpc.HealthStub(channel).Check(asked).status
        models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
        return next(found.state for found in models if found.name == model), health


def test_callers_are_told_others_are_answered_and_the_model_comes_back(tmp_path, launch, sized):
    running = launch(server_toml(SLOW, model_toml("tiny")), env={"SLOW_S": "12"})
    wait_settled(running.address)
    count = sized(4, 40)
    with ThreadPoolExecutor(count) as pool:
        (tmp_path / "armed").touch()
        calls = [pool.submit(explain, running.address, "slow") for _ in range(count)]
        until((tmp_path / "seen").exists)
        (tmp_path / "armed").unlink()
        assert explain(running.address, "tiny").explanations
        for call in calls:
            error = call.exception(SETTLE_TIMEOUT_S)
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert Details(error).info.reason == "MODEL_HUNG"
    assert explain(running.address, "tiny").explanations
    until(lambda: "model slow is unavailable" in running.log())
    assert "in forward" in running.log()
    until(lambda: state(running.address, "slow") == (READY, SERVING))
    assert "what it ran has ended after all" in running.log()
    assert explain(running.address, "slow").explanations


def test_the_states_tell_and_new_calls_are_refused_at_once(tmp_path, launch):
    running = launch(server_toml(SLOW, model_toml("tiny"), grace_s=0), env={"SLOW_S": "3600"})
    wait_settled(running.address)
    (tmp_path / "armed").touch()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(explain, running.address, "slow")
        assert isinstance(call.exception(SETTLE_TIMEOUT_S), grpc.RpcError)
    until(lambda: state(running.address, "slow") == (UNAVAILABLE, NOT_SERVING))
    assert state(running.address, "tiny") == (READY, SERVING)
    with pytest.raises(grpc.RpcError) as refused:
        explain(running.address, "slow")
    assert Details(refused.value).info.reason == "MODEL_HUNG"
    running.process.terminate()
    assert running.process.wait(SETTLE_TIMEOUT_S) == 0


def test_a_server_told_so_ends_when_a_model_hangs(tmp_path, launch):
    running = launch(server_toml(SLOW, exit_on_hang=True, grace_s=0), env={"SLOW_S": "3600"})
    wait_settled(running.address)
    (tmp_path / "armed").touch()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(explain, running.address, "slow")
        assert isinstance(call.exception(SETTLE_TIMEOUT_S), grpc.RpcError)
        assert running.process.wait(SETTLE_TIMEOUT_S) == 1
    assert "exit_on_hang" in running.log()
