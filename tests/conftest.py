"""Fixtures shared by all tests: real photos, a real server process, and a server on the test's own loop."""

import asyncio
import os

# Small tensors: one thread per operation is faster, on a busy machine a hundred times. NumPy reads this when imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As servers do: tests import onnxruntime themselves.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import gc
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
import pytest
import pytest_asyncio

from server_process import SETTLE_TIMEOUT_S, ServerProcess, start_server_process, wait_settled
from server_toml import model_toml, server_toml

SERVER_TOML = server_toml(
    model_toml("tiny", engine=None, layers=("body", "stem")),
    model_toml("tiny_mlp"),
    model_toml("broken", engine=None),
    '[[models]]\nname = "efficientnet_lite0"\nsource = "embedded:efficientnet_lite0"\nengine = "torch"',
    log_format="json",
    reflection=True,
    max_message_bytes=8_388_608,
    max_queue_length=64,
    max_targets=16,
    default_model="tiny",
)


@pytest.fixture(scope="session")
def chelsea_path() -> Path:
    """A photo of a cat, PNG, 451x300."""
    return Path(str(files("skimage") / "data" / "chelsea.png"))


@pytest.fixture(scope="session")
def chelsea(chelsea_path: Path) -> np.ndarray:
    """The same, as RGB uint8 (300, 451, 3)."""
    return cv2.imread(str(chelsea_path), cv2.IMREAD_COLOR_RGB)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that wants the server waits until its models are exported."""
    for item in items:
        if "server" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.timeout(SETTLE_TIMEOUT_S + 60))


def pytest_collection_finish() -> None:
    """What was imported until now stays: the garbage collector need not walk over it in every test."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where every server of this run keeps its exports, so that a model is exported once, whichever worker is first."""
    shared = os.environ.get("TESTS_CACHE_HOME")
    if shared is None and "PYTEST_XDIST_WORKER" in os.environ:
        shared = str(tmp_path_factory.getbasetemp().parent / "cache")
    folder = tmp_path_factory.mktemp("cache") if shared is None else Path(shared)
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server process: models tiny (the default), tiny_mlp, broken (FAILED) and efficientnet_lite0."""
    running = start_server_process(tmp_path_factory.mktemp("server"), SERVER_TOML)
    try:
        wait_settled(running.address)
        yield running
    finally:
        running.process.terminate()
        exit_code = running.process.wait(30)
    assert exit_code == 0, running.log()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start server processes in the test's folder: `launch(toml, env=...)`. What runs afterwards is killed."""
    running: list[ServerProcess] = []

    def start(toml: str, **options: object) -> ServerProcess:
        running.append(start_server_process(tmp_path, toml, **options))
        return running[-1]

    yield start
    for server in running:
        server.process.kill()
        server.process.wait()


StartServer = Callable[..., "object"]


@pytest_asyncio.fixture
async def start_server(tmp_path: Path) -> AsyncIterator[StartServer]:
    """Start servers on the test's own loop, so that it can reach into them: `await start_server(toml)`."""
    # Imported late: client tests that never ask for this fixture need not wait for torch.
    import tiny_models  # noqa: PLC0415
    from heatlens_server.app import Server  # noqa: PLC0415
    from heatlens_server.config import load_config  # noqa: PLC0415

    tiny_models.make_all()
    running: list[Server] = []

    async def start(toml: str) -> Server:
        path = tmp_path / f"server{len(running)}.toml"
        path.write_text(toml)
        server = await Server.start(load_config(path))
        running.append(server)
        await server.wait_loaded()
        while any(status.next_engine for status in server.fleet):  # noqa: ASYNC110 - a process makes it
            await asyncio.sleep(0.02)
        return server

    yield start
    for server in running:
        await server.drain(1.0)
