"""Metrics of a server on the test's own loop, as Prometheus would scrape them."""

import asyncio
import urllib.request
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heatlens_server.app import Server

METRICS = '[metrics]\nlisten = "127.0.0.1:0"\n'
"""To be put behind a server's configuration."""

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


async def scrape_text(server: "Server", accept: str = "") -> str:
    """What the server answers to GET /metrics, in the format of the header Accept."""
    request = urllib.request.Request(f"http://127.0.0.1:{server.metrics_port}/metrics", headers={"Accept": accept})

    def get() -> str:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read().decode()

    return await asyncio.to_thread(get)
