"""Health checks: what they may send, and watchers that do not read."""

import asyncio
from typing import Self

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from heatlens_server.api.admission import Admission
from heatlens_server.api.calls import CallGate
from heatlens_server.core.events import Observer
from heatlens_server.transports.grpc import health_calls
from heatlens_server.transports.grpc.interceptor import CallInterceptor
from in_process_server import until
from raw_http2 import RawConnection, end_stream, frame, headers, message

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Rig:
    """A server whose health anybody may ask for."""

    async def __aenter__(self) -> Self:
        self.health = health_aio.HealthServicer()
        gate = CallGate(Observer(), token="s3cret", admission=Admission(receive_timeout_s=0.2))
        self.server = grpc.aio.server(interceptors=[CallInterceptor(gate)])
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        self.stub = health_pb2_grpc.HealthStub(self.channel)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.channel.close()
        await self.server.stop(0)


async def refused(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value.code().name


async def test_checks_and_watches_are_answered():
    async with Rig() as rig:
        assert (await rig.stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        assert await refused(rig.stub.Check(health_pb2.HealthCheckRequest(service="no"))) == "NOT_FOUND"
        watch = rig.stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        await rig.health.set("", NOT_SERVING)
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()


async def test_a_check_that_is_no_message_or_never_whole_is_refused():
    async with Rig() as rig:
        raw = rig.channel.stream_unary("/grpc.health.v1.Health/Check")
        assert await refused(raw(iter([b"\xff"]))) == "INVALID_ARGUMENT"
        assert await refused(raw(iter([]))) == "INVALID_ARGUMENT"
        slow = rig.channel.stream_unary("/grpc.health.v1.Health/Check")()
        assert await refused(slow) == "RESOURCE_EXHAUSTED"


async def test_what_a_watcher_sends_is_small_as_it_is_kept():
    async with Rig() as rig:
        big = health_pb2.HealthCheckRequest(service="n" * 5000)
        assert await refused(rig.stub.Watch(big).read()) == "INVALID_ARGUMENT"
        assert await refused(rig.stub.Check(big)) == "INVALID_ARGUMENT"
        raw = rig.channel.unary_stream("/grpc.health.v1.Health/Watch")
        unknown_field = b"\x7a\xd0\x0f" + bytes(2000)
        assert await raw(unknown_field).read()
        assert await refused(raw(unknown_field * 3).read()) == "INVALID_ARGUMENT"


async def test_watchers_are_counted(monkeypatch):
    monkeypatch.setattr(health_calls, "_MOST_WATCHERS", 1)
    async with Rig() as rig:
        watch = rig.stub.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        assert await refused(rig.stub.Watch(health_pb2.HealthCheckRequest()).read()) == "RESOURCE_EXHAUSTED"
        watch.cancel()


async def test_a_watcher_that_does_not_read_keeps_nobody_waiting():
    async with Rig() as rig:
        deaf = await asyncio.to_thread(RawConnection, rig.address, window_bytes=0)
        deaf.send(headers(1, "/grpc.health.v1.Health/Watch"), frame(0, 0, 1, message(b"")), end_stream(1))
        watch = rig.stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        await until(lambda: rig.health._watcher_count_by_service[""] == 2)
        async with asyncio.timeout(60):
            await rig.health.set("", NOT_SERVING)
            await rig.health.set("", SERVING)
            await rig.health.enter_graceful_shutdown()
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        deaf.close()
