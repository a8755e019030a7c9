"""A server in a process of its own that tells what it holds: the real `serve`, with one addition.

For each line on its standard input it writes a line of JSON: its counters, queue, file descriptors and threads. Run as
a program it is the server; imported, it starts one.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    # Costs seconds: the test's own process needs none of it.
    from heatlens_server.app import Server

SUPPORT = Path(__file__).parent
PATIENCE_S = 60.0

BALANCES = ("streams", "readers", "frames", "tickets")


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server has at one moment.

    Attributes:
        created: of each kind in the streams' counters.
        released: the same.
        queued: images admitted by all models and not yet claimed by a batch.
        fds: open file descriptors.
        threads: of the whole process, native ones included.
        python_threads: those that Python knows.
    """

    created: dict[str, int]
    released: dict[str, int]
    queued: int
    fds: int
    threads: int
    python_threads: int

    def open(self, kind: str) -> int:
        """How many of a kind there are."""
        return self.created[kind] - self.released[kind]

    @property
    def balanced(self) -> bool:
        """Whether all that streams took was given back."""
        return self.created == self.released and self.queued == 0


class ObservedServer:
    """The test's end of it."""

    def __init__(self, folder: Path, toml: str, *, env: dict[str, str] | None = None) -> None:
        """Start it and wait until its models are loaded."""
        config, self._log_path = folder / "observed.toml", folder / "observed.log"
        config.write_text(toml)
        with self._log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **import_path(), "SLOW_FOLDER": str(folder), **(env or {})},
            )
        self._ps = psutil.Process(self.process.pid)
        self.address = f"127.0.0.1:{self._line()}"

    @property
    def pid(self) -> int:
        """The process."""
        return self.process.pid

    def log(self) -> str:
        """What it logged so far."""
        return self._log_path.read_text()

    def holdings(self) -> Holdings:
        """Ask what it holds. Its event loop answers, so whatever the loop had to do before is done."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Holdings(**json.loads(self._line()), fds=self._ps.num_fds(), threads=self._ps.num_threads())

    def until(self, condition: Callable[[Holdings], bool]) -> Holdings:
        """Ask until something is so; fails after a while, and says what it held."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition(held := self.holdings()):
            assert time.monotonic() < deadline, held
            time.sleep(0.01)
        return held

    def stop(self, timeout_s: float = PATIENCE_S) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        try:
            return self.process.wait(timeout_s)
        finally:
            self.close()

    def close(self) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        assert line, self.log()
        return line.strip()


def import_path() -> dict[str, str]:
    """The environment of a process that imports what the tests do."""
    return {"PYTHONPATH": os.pathsep.join([str(SUPPORT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])}


@contextlib.contextmanager
def observed_server(folder: Path, toml: str, *, env: dict[str, str] | None = None) -> Iterator[ObservedServer]:
    """A running server; killed at the end if it still runs."""
    server = ObservedServer(folder, toml, env=env)
    try:
        yield server
    finally:
        server.close()


def rss_bytes(pid: int, *, peak: bool = False) -> int:
    """A process's resident memory, now or the most since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def forget_peak(pid: int) -> None:
    """Start the measurement of the peak anew (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _main(config_path: str) -> None:
    """Serve until SIGTERM."""
    import asyncio  # noqa: PLC0415 - the imports of the other end

    import uvloop  # noqa: PLC0415

    import tiny_models  # noqa: PLC0415
    from heatlens_server.app import serve  # noqa: PLC0415
    from heatlens_server.config import load_config  # noqa: PLC0415
    from heatlens_server.telemetry.logs import configure_logging  # noqa: PLC0415

    tiny_models.make_all()
    if os.environ.get("LEAK"):
        _leak()
    config = load_config(Path(config_path))
    configure_logging(log_format=config.server.log_format, level=config.server.log_level)
    tasks = []

    def on_start(server: "Server") -> None:
        tasks.append(asyncio.get_running_loop().create_task(_announce(server)))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        ended_in_time = runner.run(serve(config, on_start=on_start))
    os._exit(0 if ended_in_time else 1)


async def _announce(server: "Server") -> None:
    import asyncio  # noqa: PLC0415

    await server.wait_loaded()
    print(server.port, flush=True)
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _tell, server)


def _tell(server: "Server") -> None:
    import threading  # noqa: PLC0415

    if not os.read(sys.stdin.fileno(), 1):
        return
    counters = server.streams.counters
    queues = [status.served.queue for status in server.fleet if status.served is not None]
    told = {
        "created": {name: getattr(counters, name).created for name in BALANCES},
        "released": {name: getattr(counters, name).released for name in BALANCES},
        "queued": sum(len(queue.batcher) for queue in queues),
        "python_threads": threading.active_count(),
    }
    print(json.dumps(told), flush=True)


def _leak() -> None:
    """Keep every answer: what a test of steady memory must find."""
    from heatlens_server.api.explainer import Explainer  # noqa: PLC0415

    kept, answer = [], Explainer.answer

    async def leaking(*args: object, **kwargs: object) -> object:
        kept.append(await answer(*args, **kwargs))
        return kept[-1]

    Explainer.answer = leaking


if __name__ == "__main__":
    _main(sys.argv[1])
