"""Streams of health checks and reflection: each keeps the name that it was asked for, and no more."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as rpb
from grpc_reflection.v1alpha import reflection_pb2_grpc

from heatlens import Client
from messages import distinct
from observed_server import rss_bytes
from raw_http2 import headers, message
from server_process import wait_settled
from server_toml import server_toml

pytestmark = pytest.mark.serial

MB = 1 << 20
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
# A field that nobody knows, number 15, of 15 MB, which protobuf keeps.
UNKNOWN = b"\x7a" + b"\x80\x80\xc0\x07" + bytes(15 * MB)


def test_streams_that_keep_what_they_sent_keep_little(launch, connect, sized):
    server = launch(server_toml(reflection=True))
    wait_settled(server.address)
    image = distinct(1)[0]
    with Client(server.address) as client:
        for _ in range(3):
            assert client.explain(image, timeout=60).explanations
        before = rss_bytes(server.process.pid)
        whole = message(UNKNOWN)
        for method, data in ((WATCH, whole), (REFLECTION, whole), (REFLECTION, whole[:-1])):
            for _ in range(sized(14, 200)):
                peer = connect(server.address, source="127.0.0.2")
                peer.send(headers(1, method))
                peer.upload(1, data, patience_s=0.2)
        # 15 MB each before, for as long as its sender liked. Eight are read at a time.
        assert rss_bytes(server.process.pid, peak=True) - before < 450 * MB
        assert client.explain(image, timeout=60).explanations
    with grpc.insecure_channel(server.address) as channel:
        checked = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=60)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
        listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([rpb.ServerReflectionRequest(list_services="*")]), timeout=60
        )
        assert next(listed).list_services_response.service
