"""The real `heatlens-server serve` in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from heatlens.v1 import model_pb2, model_pb2_grpc

SUPPORT = Path(__file__).parent

SETTLE_TIMEOUT_S = 300.0
"""Long enough for some exports on a busy machine."""


@dataclass(frozen=True)
class ServerProcess:
    """A `heatlens-server serve` that is running."""

    address: str
    process: "subprocess.Popen[str]"
    log_path: Path

    def log(self) -> str:
        """What it logged so far."""
        return self.log_path.read_text()

    def has_torch(self) -> bool:
        """Whether torch's libraries are mapped into it."""
        maps = Path(f"/proc/{self.process.pid}/maps").read_text()
        assert "libc.so" in maps  # this can fail
        return "libtorch" in maps


def start_server_process(
    folder: Path,
    toml: str,
    *,
    env: dict[str, str] | None = None,
    python: Path | str = sys.executable,
    stderr: int | None = None,
) -> ServerProcess:
    """Start the real command with a configuration, by an interpreter, and wait until it listens.

    Its log is a file, or goes to the descriptor `stderr`.
    """
    config, port_file, log_path = folder / "server.toml", folder / "port", folder / "log.jsonl"
    config.write_text(toml)
    # What the tests import, the server must import as well.
    path = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [str(python), "-m", "heatlens_server", "serve", "-c", str(config), "--port-file", str(port_file)],
            stderr=log if stderr is None else stderr,
            stdout=subprocess.DEVNULL if stderr is None else stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "SLOW_FOLDER": str(folder), **(env or {})},
        )
    deadline = time.monotonic() + 90
    while not (port_file.exists() and port_file.read_text().endswith("\n")):
        assert process.poll() is None, log_path.read_text()
        assert time.monotonic() < deadline, log_path.read_text()
        time.sleep(0.05)
    return ServerProcess(f"127.0.0.1:{port_file.read_text().strip()}", process, log_path)


def until(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_settled(address: str, *, token: str | None = None) -> None:
    """Wait until no model is loading, and none is run by an engine that another takes over from."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while any(
            m.state == model_pb2.Model.STATE_LOADING or m.next_engine
            for m in stub.ListModels(
                model_pb2.ListModelsRequest(), timeout=10, wait_for_ready=True, metadata=metadata
            ).models
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
