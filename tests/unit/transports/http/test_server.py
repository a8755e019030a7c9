"""What the HTTP server answers: metrics, and probes that ask the event loop."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, Gauge

from heatlens_server.transports.http.server import MetricsServer
from scrapes import get_probe


async def test_probes_answer_as_they_are_told_and_every_other_path_has_the_metrics():
    registry = CollectorRegistry()
    Gauge("things", "Things.", registry=registry).set(3)
    serves = {"/live": True, "/ready": False}
    server = MetricsServer("127.0.0.1:0", registry, {path: lambda path=path: serves[path] for path in serves})
    try:
        assert await asyncio.to_thread(get_probe, server.port, "live") == (200, "live\n")
        assert await asyncio.to_thread(get_probe, server.port, "ready") == (503, "not ready\n")
        serves["/ready"] = True
        assert await asyncio.to_thread(get_probe, server.port, "ready") == (200, "ready\n")
        assert "things 3.0" in (await asyncio.to_thread(get_probe, server.port, "metrics"))[1]
    finally:
        await asyncio.to_thread(server.close)


async def test_a_loop_that_does_not_answer_is_not_live():
    server = MetricsServer("127.0.0.1:0", CollectorRegistry(), {"/live": lambda: True}, answer_s=0.1)
    try:
        with ThreadPoolExecutor(1) as aside:
            # The loop does nothing else while this waits.
            assert aside.submit(get_probe, server.port, "live").result(30) == (503, "not live\n")
    finally:
        await asyncio.to_thread(server.close)
