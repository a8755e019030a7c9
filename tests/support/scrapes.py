"""Metrics of a server on the test's own loop, as Prometheus would scrape them."""

import asyncio
import urllib.error
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


def get_probe(port: int, name: str) -> tuple[int, str]:
    """What /live or /ready says: the status and the text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{name}", timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


async def probe(server: "Server", name: str) -> tuple[int, str]:
    """The same, of a server on the test's loop."""
    return await asyncio.to_thread(get_probe, server.metrics_port, name)
