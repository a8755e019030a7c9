"""Start, health, drain, tokens, TLS: the real command in a process of its own."""

import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from heatlens.v1 import explain_pb2 as pb
from heatlens.v1 import explain_pb2_grpc, method_pb2, model_pb2, model_pb2_grpc
from messages import Details, distinct, pixels
from server_process import wait_settled
from server_toml import model_toml, server_toml

SLOW = model_toml("slow")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
IMAGE = pixels(distinct(1)[0])


def health(address: str, service: str = "") -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status


def explain(address: str, *, method: int = method_pb2.METHOD_UNSPECIFIED, **kwargs) -> pb.ExplainResponse:
    request = pb.ExplainRequest(image=IMAGE, options=pb.ExplainOptions(method=method))
    with grpc.insecure_channel(address) as channel:
        return explain_pb2_grpc.ExplainServiceStub(channel).Explain(request, timeout=30, **kwargs)


def slow_call(folder: Path, pool: ThreadPoolExecutor, address: str, **kwargs) -> "Future[pb.ExplainResponse]":
    """A call that is in the model now, and will be for SLOW_S seconds, or that long per step."""
    (folder / "armed").touch()
    in_flight = pool.submit(explain, address, **kwargs)
    deadline = time.monotonic() + 20
    while not (folder / "seen").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return in_flight


def test_health_is_told_per_service_and_per_model(server):
    for service in ("", "heatlens.v1.ExplainService", "heatlens.v1.ModelService", "heatlens.v1.ExplainService/tiny"):
        assert health(server.address, service) == SERVING
    assert health(server.address, "heatlens.v1.ExplainService/broken") == NOT_SERVING
    with pytest.raises(grpc.RpcError) as raised:
        health(server.address, "heatlens.v1.ExplainService/unknown")
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_failed_model_says_why_without_a_path_and_the_others_serve(server):
    with grpc.insecure_channel(server.address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest())
        by_name = {model.name: model for model in models.models}
        assert models.default_model == "tiny"
        assert list(by_name) == ["tiny", "tiny_mlp", "broken", "efficientnet_lite0"]
        assert by_name["broken"].state == model_pb2.Model.STATE_FAILED
        assert by_name["broken"].state_message
        assert "/secret/path" not in by_name["broken"].state_message
        assert by_name["tiny"].state == model_pb2.Model.STATE_READY
        assert list(by_name["tiny"].layers) == ["body", "stem"]
        with pytest.raises(grpc.RpcError) as raised:
            explain_pb2_grpc.ExplainServiceStub(channel).Explain(pb.ExplainRequest(model="broken", image=IMAGE))
    assert raised.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "/secret/path" not in raised.value.details()
    assert Details(raised.value).precondition.violations


def test_server_info_reports_the_limits_in_force(server):
    with grpc.insecure_channel(server.address) as channel:
        info = model_pb2_grpc.ModelServiceStub(channel).GetServerInfo(model_pb2.GetServerInfoRequest())
    assert info.max_message_bytes == 8388608
    assert info.max_queue_length == 64
    assert info.max_targets == 16
    assert info.max_image_pixels == 64_000_000
    assert info.max_batch_size >= 1
    assert info.version


def test_reflection_lists_the_services(server):
    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([ask]))
    names = {service.name for service in answer.list_services_response.service}
    ours = {"heatlens.v1.ExplainService", "heatlens.v1.ModelService"}
    assert {*ours, "grpc.health.v1.Health", "inference.GRPCInferenceService"} <= names


def test_reflection_is_off_by_default(launch):
    running = launch(server_toml())
    with grpc.insecure_channel(running.address) as channel:
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError) as raised:
            list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask])))
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    # SIGTERM while the model may still be loading: nothing to wait for.
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0


def test_second_server_on_the_same_port_fails_loudly(server, tmp_path):
    config = tmp_path / "second.toml"
    config.write_text(f'[server]\nlisten = "{server.address}"\n')
    second = subprocess.run(
        [sys.executable, "-m", "heatlens_server", "serve", "-c", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert "cannot listen" in second.stderr
    assert "Traceback" not in second.stderr


@pytest.mark.serial
def test_sigterm_finishes_calls_in_flight_and_refuses_new_ones(tmp_path, launch):
    running = launch(server_toml(SLOW, grace_s=20))
    wait_settled(running.address)
    with grpc.insecure_channel(running.address) as watching, ThreadPoolExecutor() as pool:
        watch = health_pb2_grpc.HealthStub(watching).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        in_flight = slow_call(tmp_path, pool, running.address)
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as refused:
            explain(running.address)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert Details(refused.value).info.reason == "SERVER_DRAINING"
        assert not in_flight.done()
        assert in_flight.result().explanations
        # The watcher is still there: it does not hold the server until the end of the grace.
        assert running.process.wait(20) == 0
    assert time.monotonic() - started < 15


@pytest.mark.serial
def test_call_that_outlives_the_grace_is_cut_off(tmp_path, launch):
    running = launch(server_toml(SLOW, grace_s=0.2), env={"SLOW_S": "8"})
    wait_settled(running.address)
    with ThreadPoolExecutor() as pool:
        in_flight = slow_call(tmp_path, pool, running.address)
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        assert isinstance(in_flight.exception(), grpc.RpcError)
        assert running.process.wait(20) == 0
        assert time.monotonic() - started < 7


@pytest.mark.serial
def test_calls_in_steps_that_outlive_the_grace_are_told_so(tmp_path, launch):
    running = launch(server_toml(SLOW, grace_s=1.5), env={"SLOW_S": "0.3"})
    wait_settled(running.address)
    with ThreadPoolExecutor() as pool:
        # 35 runs of Score-CAM's, of which one waits for the other.
        calls = [slow_call(tmp_path, pool, running.address, method=method_pb2.METHOD_SS_CAM) for _ in range(2)]
        started = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        for call in calls:
            error = call.exception()
            assert isinstance(error, grpc.RpcError)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert Details(error).info.reason == "SERVER_DRAINING"
        assert running.process.wait(20) == 0
        assert time.monotonic() - started < 10


def test_token_is_required_but_for_health(launch):
    running = launch(server_toml(), env={"HEATLENS_SERVER__TOKEN": "s3cret"})
    assert health(running.address, "heatlens.v1.ExplainService") in {SERVING, NOT_SERVING}
    for metadata in ([], [("authorization", "Bearer wrong")], [("authorization", "s3cret")]):
        with pytest.raises(grpc.RpcError) as raised:
            explain(running.address, metadata=metadata)
        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "s3cret" not in raised.value.details()
    with grpc.insecure_channel(running.address) as channel:
        models = model_pb2_grpc.ModelServiceStub(channel).ListModels(
            model_pb2.ListModelsRequest(), metadata=[("authorization", "Bearer s3cret")]
        )
        assert models.models
    assert "s3cret" not in running.log()


def test_tls_with_client_certificates(tmp_path, launch):
    authority = trustme.CA()
    for name, certificate in (("server", authority.issue_cert("localhost")), ("client", authority.issue_cert("me"))):
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    tls = '[server.tls]\ncertificate = "server.pem"\nprivate_key = "server.key"\nclient_ca = "ca.pem"'
    running = launch(server_toml(tls))
    address = running.address.replace("127.0.0.1", "localhost")
    ca = (tmp_path / "ca.pem").read_bytes()
    with_key = grpc.ssl_channel_credentials(
        ca, (tmp_path / "client.key").read_bytes(), (tmp_path / "client.pem").read_bytes()
    )
    with grpc.secure_channel(address, with_key) as channel:
        assert model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest()).models
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel, pytest.raises(grpc.RpcError):
        model_pb2_grpc.ModelServiceStub(channel).ListModels(model_pb2.ListModelsRequest(), timeout=5)


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.4])
def test_sigterm_while_a_model_is_loading_ends_with_0(launch, delay_s):
    running = launch('[server]\nlisten = "127.0.0.1:0"\n')
    time.sleep(delay_s)
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0, running.log()


def test_port_file_in_no_folder_is_refused_before_anything_starts(tmp_path):
    refused = subprocess.run(
        [sys.executable, "-m", "heatlens_server", "serve", "--port-file", str(tmp_path / "none" / "port")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "--port-file" in refused.stderr
