"""What health checks and watchers are told while models come and go."""

import os
import socket
import stat
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from heatlens_server.config import ModelConfig, ServerConfig
from heatlens_server.core.errors import ConfigError, ModelLoadError
from heatlens_server.fleet.build import BuiltModel
from heatlens_server.fleet.fleet import Fleet
from heatlens_server.transports.grpc.server import LIVENESS, READINESS, SERVICES, Health, bind

SERVING, NOT_SERVING, UNKNOWN = "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"
MODEL = "heatlens.v1.ExplainService/a"


def fail(config: ModelConfig) -> BuiltModel:
    raise ModelLoadError("no weights")


@pytest_asyncio.fixture
async def health() -> AsyncIterator[tuple[Health, health_pb2_grpc.HealthStub]]:
    made, server = Health(), grpc.aio.server()
    made.add_to(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield made, health_pb2_grpc.HealthStub(channel)
    await server.stop(0)


@pytest.mark.parametrize(("keys", "mode"), [({}, 0o600), ({"socket_mode": "0660"}, 0o660)])
async def test_a_unix_socket_has_the_configured_mode_whatever_the_umask(tmp_path, keys, mode):
    path, server = tmp_path / "s", grpc.aio.server()
    before = os.umask(0)
    try:
        bind(server, ServerConfig(listen=f"unix:{path}", **keys))
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    await server.stop(0)


async def test_a_socket_that_a_server_answers_on_is_not_taken_and_one_that_was_left_is(tmp_path):
    listen = f"unix:{tmp_path / 's'}"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        with pytest.raises(ConfigError, match=r"^server\.listen: another server listens on unix:"):
            bind(grpc.aio.server(), ServerConfig(listen=listen))
    server = grpc.aio.server()
    bind(server, ServerConfig(listen=listen))
    await server.stop(0)


async def test_a_key_of_another_certificate_is_said(tmp_path):
    names = []
    for one in ("a", "b"):
        certificate = trustme.CA().issue_cert(one)
        certificate.private_key_pem.write_to_path(tmp_path / f"{one}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{one}.pem")
        names.append(tmp_path / one)
    tls = {"certificate": names[0].with_suffix(".pem"), "private_key": names[1].with_suffix(".key")}
    with pytest.raises(ConfigError, match=r"^server\.tls: certificate and private_key are no .*KEY_VALUES_MISMATCH"):
        bind(grpc.aio.server(), ServerConfig(listen="127.0.0.1:0", tls=tls))


async def status(stub: health_pb2_grpc.HealthStub, service: str) -> str:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_a_model_fails_and_is_unloaded_and_its_watcher_hears_of_it(health):
    made, stub = health
    with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
        await status(stub, MODEL)
    fleet = Fleet(build=fail, make_queue=lambda *_: None, publish=lambda: made.update(fleet))
    loading = fleet.load(ModelConfig(name="a", source="embedded:efficientnet_lite0"))
    await made.update(fleet)
    watch = stub.Watch(health_pb2.HealthCheckRequest(service=MODEL), timeout=20)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await loading
    assert [await status(stub, name) for name in (MODEL, "", READINESS, *SERVICES)] == [NOT_SERVING] * 5
    assert await status(stub, LIVENESS) == SERVING
    await fleet.unload("a")
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
    assert [await status(stub, name) for name in (MODEL, "")] == [UNKNOWN, NOT_SERVING]


async def test_a_server_that_drains_is_alive_and_not_ready(health):
    made, stub = health
    await made.update(Fleet(build=fail, make_queue=lambda *_: None))
    await made.drain()
    await made.update(Fleet(build=fail, make_queue=lambda *_: None))
    services = (LIVENESS, READINESS, "", *SERVICES)
    assert [await status(stub, name) for name in services] == [SERVING] + [NOT_SERVING] * 4
