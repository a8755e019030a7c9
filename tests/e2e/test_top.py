"""`heatlens top` of a real server."""

import asyncio
import http.server
import re
import threading
from collections.abc import Iterator

import pytest

from heatlens import AsyncClient
from heatlens_server.app import Server
from messages import distinct
from scrapes import METRICS
from server_toml import model_toml, server_toml

TOML = server_toml(model_toml("mlp", "tiny_mlp", max_batch_size=4), model_toml("broken"), default_model="mlp")
IMAGE = distinct(1)[0]


@pytest.fixture
async def served(start_server) -> Server:
    return await start_server(TOML + METRICS)


@pytest.fixture
def not_a_heatlens() -> Iterator[str]:
    """Something else that answers by HTTP."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        yield f"127.0.0.1:{other.server_port}"
        other.shutdown()
        thread.join()


async def test_one_interval_says_what_clients_saw(served, run):
    began, over = asyncio.Event(), asyncio.Event()
    answered = 0

    async def explain() -> None:
        nonlocal answered
        async with AsyncClient(f"127.0.0.1:{served.port}") as client, client.stream() as stream:
            while not over.is_set():
                await client.explain(IMAGE)
                answered += 1
                began.set()
            async for _ in stream.map([IMAGE] * 3):
                pass

    caller = asyncio.create_task(explain())
    await began.wait()
    arguments = ("top", "--metrics", f"127.0.0.1:{served.metrics_port}")
    shown = (await asyncio.to_thread(run, *arguments, "--interval", "0.5")).stdout
    over.set()
    await caller
    assert re.match(r"heatlens \S+ +http://127.0.0.1:\d+/metrics +calls in flight \d+ +open streams 1 ", shown)
    # Each value stands below its header.
    header = re.sub(r"p50 p99 ms", "ms", next(line for line in shown.splitlines() if line.startswith("MODEL")))
    names = "MODEL STATE ENGINE DEVICES QUEUE IMAGES/s FAILED/s BATCH WAIT ms COMPUTE ms BUSY"
    assert header.split() == names.split()
    model = next(line for line in shown.splitlines() if line.startswith("mlp"))
    state, engine, device, precision, devices, _queue, images, failed, batch, *_, busy, percent = model.split()[1:]
    assert (state, engine, device, precision, devices) == ("ready", "torch", "cpu", "fp32", "1")
    assert 0 < float(images) <= 2 * answered
    assert (failed, float(batch) >= 1, percent, float(busy) > 0) == ("0.0", True, "%", True)
    assert next(line for line in shown.splitlines() if line.startswith("broken")).split()[1:3] == ["failed", "-"]
    call = next(line for line in shown.splitlines() if line.startswith("Explain "))
    assert call.split()[1] == "mlp"
    assert f"OK {call.split()[2]}" in call
    # Frames have a table once there are some.
    assert "FRAMES" not in shown
    after = (await asyncio.to_thread(run, *arguments, "--once", "--interval", "0.1")).stdout
    frames = after[after.index("FRAMES OF") :].splitlines()[1].split()
    assert frames[:5] == ["mlp", "0.0", "0.0", "0.0", "0.0"]


@pytest.mark.parametrize("address", ["localhost:1", "file:///etc/hostname"])
def test_nothing_to_read_is_said(run, address):
    done = run("top", "--metrics", address, "--once", exit_code=2)
    assert re.fullmatch(r"heatlens: error: \S*(localhost:1/metrics: .*refused|'file:.* nor a URL)\s", done.stderr)


def test_something_else_is_said(run, not_a_heatlens):
    done = run("top", "--metrics", not_a_heatlens, "--once", exit_code=2)
    assert "answers with something else than metrics: HTTP Error 501" in done.stderr
