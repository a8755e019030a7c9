"""The process of a model with `isolation = "process"`: `python -m heatlens_server.engine_process RUN LOAD`.

RUN and LOAD are file descriptors of two connections to the server. The order comes by LOAD, and so does all that loads
something later; RUN carries what the device thread asks. Each request is a tuple, a name and its arguments; each answer
a pair: whether it failed, and the value or the error. When standard input ends, the server has ended, and so does this
process.
"""

import contextlib
import faulthandler
import functools
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatlens_server.allocator import keep_freed_memory, return_freed_memory
from heatlens_server.core.errors import HeatlensError, ModelLoadError
from heatlens_server.native_threads import wait_briefly
from heatlens_server.telemetry.logs import configure_logging
from heatlens_server.telemetry.output import end_output, queue_output

if TYPE_CHECKING:
    from heatlens_server.core.engine import SteppingEngine, Steps
    from heatlens_server.core.results import ImageResult

_KNOWN_ERRORS = (HeatlensError, ModelLoadError, MemoryError)
"""What reaches the server as it is; of others it gets the text."""

_OOM_SCORE = 500
"""Added to what the kernel's out-of-memory killer goes by, so that it takes this process before the server's."""


@dataclass(slots=True)
class Worker:
    """Does what the server asks of an engine."""

    engine: "SteppingEngine"
    steps: "dict[int, Steps]" = field(default_factory=dict)

    def explain(self, *arguments: Any) -> "list[ImageResult]":  # noqa: ANN401 - the engine's own
        """As the engine's."""
        return self.engine.explain(*arguments)

    def load_for(self, *arguments: Any) -> None:  # noqa: ANN401
        """As the engine's."""
        self.engine.load_for(*arguments)

    def use_threads(self, count: int | None) -> None:
        """As the engine's."""
        self.engine.use_threads(count)

    def begin(self, key: int, image: Any, target: Any, spec: Any, rows: int) -> None:  # noqa: ANN401
        """Begin an explanation in steps, which goes by `key` from now on."""
        self.steps[key] = self.engine.steps(image, target, spec, rows=rows)

    def advance(self, key: int) -> "ImageResult | None":
        """Run the next step; the result if it was the last one."""
        try:
            next(self.steps[key])
        except StopIteration as stop:
            del self.steps[key]
            result: ImageResult = stop.value
            return result
        except BaseException:
            del self.steps[key]
            raise
        return None

    def give_up(self, key: int) -> None:
        """Free what an explanation in steps holds."""
        if key in self.steps:
            self.steps.pop(key).close()


def main(run: Connection, load: Connection) -> None:
    """Load the model that the first message orders, and do what the server asks until it ends."""
    threading.Thread(target=_end_with_server, daemon=True).start()
    # The server drains and ends this process; a signal to the whole group is not for it.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(_OOM_SCORE))
    keep_freed_memory()
    wait_briefly()
    order = load.recv()
    queue_output()
    faulthandler.enable()
    configure_logging(log_format=order["log_format"], level=order["log_level"])
    sys.path[:] = order["path"] or sys.path
    from heatlens_server.config import ModelConfig  # noqa: PLC0415 - imports numpy, see `keep_freed_memory`
    from heatlens_server.fleet.build import build  # noqa: PLC0415
    from heatlens_server.fleet.isolated_engine import Loaded  # noqa: PLC0415

    worker: Worker | None = None

    def load_model() -> Loaded:
        nonlocal worker
        built = build(ModelConfig.model_validate_json(order["config"]), cache_dir=order["cache_dir"])
        worker = Worker(built.engine)
        if order["threads"]:
            worker.use_threads(order["threads"])
        return_freed_memory()
        return Loaded.of(built)

    _answer(load, load_model)
    if worker is None:
        return
    threading.Thread(target=_answer_all, args=(load, worker), daemon=True).start()
    _answer_all(run, worker)


def _end_with_server() -> None:
    """Whatever other threads do."""
    sys.stdin.buffer.read()
    os._exit(0)


def _answer_all(connection: Connection, worker: Worker) -> None:
    """Answer requests until the connection ends, and then end the process."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            name, *arguments = connection.recv()
            method = getattr(worker, name)
            _answer(connection, functools.partial(method, *arguments))
    end_output()
    os._exit(0)


def _answer(connection: Connection, run: Callable[[], object]) -> None:
    try:
        answer = (False, run())
    except _KNOWN_ERRORS as error:
        answer = (True, error)
    except BaseException as error:
        told = "".join(traceback.format_exception(error))
        answer = (True, RuntimeError(f"{error!r} in the model's process:\n{told}"))
    try:
        message = pickle.dumps(answer, protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        message = pickle.dumps((True, RuntimeError(f"an answer of the model's process cannot be sent: {error!r}")))
    connection.send_bytes(message)


if __name__ == "__main__":
    main(*(Connection(int(descriptor)) for descriptor in sys.argv[1:3]))
    end_output()
    os._exit(1)
