"""Signals to a real server whose calls never end."""

import signal
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc
from messages import Details, distinct, pixels
from server_process import SETTLE_TIMEOUT_S, until, wait_settled
from server_toml import model_toml, server_toml

TOML = server_toml(model_toml("slow"), grace_s=3600)
FOR_EVER_S = "3600"
IMAGE = pixels(distinct(1)[0])


def explain(address: str) -> pb.ExplainResponse:
    with grpc.insecure_channel(address) as channel:
        return explain_pb2_grpc.ExplainServiceStub(channel).Explain(pb.ExplainRequest(image=IMAGE))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_the_server_and_tells_open_calls(tmp_path, launch, number):
    running = launch(TOML, env={"SLOW_S": FOR_EVER_S})
    wait_settled(running.address)
    (tmp_path / "armed").touch()
    with ThreadPoolExecutor() as pool:
        # One is in the model, others wait for it.
        calls = [pool.submit(explain, running.address) for _ in range(3)]
        until((tmp_path / "seen").exists)
        running.process.send_signal(number)
        until(lambda: "draining" in running.log())
        # One that came after the signal is refused at once, with the same error.
        assert not all(call.done() for call in calls)
        running.process.send_signal(number)
        for call in calls:
            error = call.exception(SETTLE_TIMEOUT_S)
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert Details(error).info.reason == "SERVER_DRAINING"
        assert running.process.wait(SETTLE_TIMEOUT_S) == 0
    assert "Traceback" not in running.log()


def test_sighup_ends_nothing(launch):
    running = launch(server_toml())
    running.process.send_signal(signal.SIGHUP)
    wait_settled(running.address)
    until(
        lambda: "the configuration is reloaded: 0 models loaded, 0 replaced, 0 unloaded, 1 as before" in running.log()
    )
    assert explain(running.address).explanations
    running.process.terminate()
    assert running.process.wait(SETTLE_TIMEOUT_S) == 0
