"""A model's engine in a process of its own, `python -m heatlens_server.engine_process`, which is started again.

What crashes there (a segmentation fault, `os._exit`, the kernel's out-of-memory killer) ends that process alone. What
it runs then fails with ModelInterrupted, and so does what comes until the model is loaded again. Messages are pickles
over sockets that only the two processes have: what runs there is trusted as it is without isolation.
"""

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self, cast

from heatlens_server.config import ModelConfig
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import Capabilities, MapSpec, SteppingEngine, Steps
from heatlens_server.core.errors import ModelInterrupted, ModelLoadError
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.instances import on_all_devices

_log = logging.getLogger(__name__)

_MODULE = "heatlens_server.engine_process"
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_STEADY_S = 60.0
"""How long a process has lived when the waits before it is started again begin anew at the shortest."""

_KNOWN_SPECS = 256


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a process tells about its model: a `BuiltModel` without its engine."""

    info: Capabilities
    built: BuiltModel

    @classmethod
    def of(cls, built: BuiltModel) -> Self:
        """What there is to tell about a model."""
        return cls(built.engine.info, replace(built, engine=cast("SteppingEngine", None)))

    def is_same_as(self, other: Self) -> bool:
        """Whether both tell of one model, with the same weights."""
        return (self.info, self.built.weights_version) == (other.info, other.built.weights_version)


@dataclass(frozen=True, slots=True, eq=False)
class _Child:
    """A process that has loaded the model.

    Attributes:
        process: it.
        run: to what the device thread talks.
        load: to what loaders talk.
        started_at: when it had loaded the model, on `time.monotonic`, in seconds.
    """

    process: "subprocess.Popen[bytes]"
    run: Connection
    load: Connection
    started_at: float

    def end(self) -> None:
        """Kill it. Its connections are closed when the last thread that uses them lets go of them."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


class IsolatedEngine:
    """Runs a model in a process of its own. Implements `SteppingEngine`."""

    def __init__(self, config: ModelConfig, *, cache_dir: Path | None, log_format: str, log_level: str) -> None:
        """Start the process and wait until it has loaded the model.

        Args:
            config: the model.
            cache_dir: where exports are kept; None for nowhere.
            log_format: of the process's log lines, which go where the server's do.
            log_level: the same.

        Raises:
            ModelLoadError: it cannot be loaded, or the process ended.
        """
        self._config = config
        self._order: dict[str, Any] = {
            "config": config.model_dump_json(),
            "cache_dir": cache_dir,
            "log_format": log_format,
            "log_level": log_level,
            "threads": None,
            # Code of the operator's is to be found there as it is here.
            "path": sys.path if config.source.startswith("python:") else [],
        }
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._outage: ModelInterrupted | None = None
        self._is_planned = False
        self._loaded_for: set[MapSpec] = set()
        self._keys = itertools.count()
        self._open_steps = 0
        self._asking = threading.Lock()
        child, self.loaded = self._start()
        rss_bytes = _rss_bytes(child.process.pid)
        if 0 < config.max_rss_bytes < rss_bytes:
            child.end()
            raise ModelLoadError(f"max_rss_bytes: its process has {rss_bytes} bytes as soon as it is loaded")
        self._child: _Child | None = child
        threading.Thread(target=self._keep_running, args=(child,), name=f"process-{config.name}", daemon=True).start()

    @property
    def info(self) -> Capabilities:
        """What the engine in the process can do."""
        return self.loaded.info

    @property
    def rss_bytes(self) -> int:
        """Resident memory of its process; 0 while there is none."""
        child = self._child
        return 0 if child is None else _rss_bytes(child.process.pid)

    @property
    def outage(self) -> ModelInterrupted | None:
        """Why nothing can be run at present; None if it can. Any thread may ask."""
        return self._outage

    @property
    def ready_for_s(self) -> float:
        """For how long the process has had the model, in seconds; 0.0 while it is being started."""
        child = self._child
        return 0.0 if child is None else time.monotonic() - child.started_at

    def explain(self, images: ImageArray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Explain a batch; see `core.engine.Engine.explain`.

        Raises:
            ModelInterrupted: the process has ended.
            MemoryError, HeatlensError: what the engine raised; anything else becomes a RuntimeError.
        """
        results: list[ImageResult] = self._run("explain", images, list(targets), spec)
        self._bound_memory()
        return results

    def steps(self, image: ImageArray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """Explain one image in steps; see `core.engine.SteppingEngine.steps`."""
        key = next(self._keys)
        child = self._ready_child()
        self._ask(child.run, "begin", key, image, target, spec, rows)
        self._open_steps += 1
        try:
            while (result := self._ask(child.run, "advance", key)) is None:
                yield
        except GeneratorExit:
            if child is self._child:
                self._ask(child.run, "give_up", key)
            raise
        finally:
            self._open_steps -= 1
        self._bound_memory()
        return cast("ImageResult", result)

    def is_loaded_for(self, spec: MapSpec) -> bool:
        """Whether the process has loaded what a spec needs, loads nothing later, or is not there to be asked."""
        loads_later = self.info.fallback_methods or self.info.fallback_scores
        return not loads_later or spec in self._loaded_for or self._child is None

    def load_for(self, spec: MapSpec) -> None:
        """Have the process load what a spec needs.

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        child = self._child
        if child is None:
            return
        try:
            with self._asking:
                self._ask(child.load, "load_for", spec)
        except ModelInterrupted:
            # Running says so, too, and is what callers wait for.
            return
        if len(self._loaded_for) >= _KNOWN_SPECS:
            self._loaded_for.clear()
        self._loaded_for.add(spec)

    def use_threads(self, count: int | None) -> None:
        """Have the process, and those that come after it, run on so many threads of a CPU."""
        self._order["threads"] = count
        child = self._child
        if child is not None:
            with self._asking:
                self._ask(child.load, "use_threads", count)

    def another(self) -> Self:
        """An engine for another thread: it has a process of its own, and weights of its own."""
        order = self._order
        made = type(self)(
            self._config, cache_dir=order["cache_dir"], log_format=order["log_format"], log_level=order["log_level"]
        )
        made.use_threads(order["threads"])
        return made

    def restart(self) -> None:
        """End the process, whatever it runs, and start it again. Any thread may call this."""
        child = self._child
        if child is not None:
            child.process.kill()

    def close(self) -> None:
        """End the process. Idempotent."""
        with self._changed:
            self._closed.set()
            child, self._child = self._child, None
            self._outage = self._interrupted("is closed")
            self._changed.notify_all()
        if child is not None:
            child.end()

    def _run(self, *request: object) -> Any:  # noqa: ANN401 - the engine's answer
        child = self._ready_child()
        return self._ask(child.run, *request)

    def _ready_child(self) -> _Child:
        """The process, also if it is being started again because of its memory.

        Raises:
            ModelInterrupted: there is none, for another reason.
        """
        with self._changed:
            while self._child is None and self._outage is None:
                self._changed.wait()
            if self._child is None:
                assert self._outage is not None
                raise self._outage.with_traceback(None)
            return self._child

    def _ask(self, connection: Connection, *request: object) -> Any:  # noqa: ANN401
        try:
            connection.send(request)
            failed, value = connection.recv()
        except (EOFError, OSError) as error:
            raise self._interrupted("crashed, and is started again", retry_after_s=_FIRST_WAIT_S) from error
        if failed:
            raise value
        return value

    def _interrupted(self, what: str, *, retry_after_s: float | None = None) -> ModelInterrupted:
        return ModelInterrupted(self._config.name, what, reason="MODEL_CRASHED", retry_after_s=retry_after_s)

    def _bound_memory(self) -> None:
        """Start the process again, between explanations, if it has more memory than it may."""
        limit_bytes, child = self._config.max_rss_bytes, self._child
        if not limit_bytes or child is None or self._open_steps:
            return
        rss_bytes = _rss_bytes(child.process.pid)
        if rss_bytes > limit_bytes:
            _log.warning(
                "model %s: its process has %d bytes of memory, more than max_rss_bytes: it is started again",
                self._config.name,
                rss_bytes,
            )
            with self._changed:
                if self._child is child:
                    self._is_planned, self._child = True, None
            child.process.kill()

    def _keep_running(self, child: _Child) -> None:
        """Start the process again whenever it ends, until the engine is closed."""
        wait_s = _FIRST_WAIT_S
        while True:
            code = child.process.wait()
            if time.monotonic() - child.started_at > _STEADY_S:
                wait_s = _FIRST_WAIT_S
            with self._changed:
                if self._closed.is_set():
                    return
                self._child = None
                self._loaded_for.clear()
                planned, self._is_planned = self._is_planned, False
                if not planned:
                    self._outage = self._interrupted("crashed, and is started again", retry_after_s=wait_s)
            child.end()
            if not planned:
                _log.error("model %s: its process ended by %s", self._config.name, _name_of(code))
                if self._closed.wait(wait_s):
                    return
                wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
            while (started := self._try_start(wait_s)) is None:
                if self._closed.wait(wait_s):
                    return
                wait_s = min(_LONGEST_WAIT_S, 2 * wait_s)
            with self._changed:
                if self._closed.is_set():
                    started.end()
                    return
                child = self._child = started
                self._outage = None
                self._changed.notify_all()
            _log.info("model %s: its process runs again", self._config.name)

    def _try_start(self, wait_s: float) -> _Child | None:
        try:
            child, loaded = self._start()
            if loaded.is_same_as(self.loaded):
                return child
            child.end()
            why = "the model's files hold another than was loaded; reload the model"
        except ModelLoadError as error:
            why = str(error)
        _log.error("model %s: its process cannot be started again: %s", self._config.name, why)
        with self._changed:
            self._outage = self._interrupted(f"crashed, and cannot be started again: {why}", retry_after_s=wait_s)
            self._changed.notify_all()
        return None

    def _start(self) -> tuple[_Child, Loaded]:
        """Start a process and have it load the model.

        Raises:
            ModelLoadError: it cannot, or has ended.
        """
        pairs = [socket.socketpair(), socket.socketpair()]
        theirs = [their.fileno() for _, their in pairs]
        # -P: with -m alone, modules of the current folder would come before those that are installed.
        command = [sys.executable, "-P", "-m", _MODULE, *map(str, theirs)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=theirs)
        for _, their in pairs:
            their.close()
        run, load = (Connection(ours.detach()) for ours, _ in pairs)
        child = _Child(process, run, load, time.monotonic())
        try:
            load.send(self._order)
            failed, value = load.recv()
        except (EOFError, OSError):
            failed, value = True, ModelLoadError(f"the process that loads it ended by {_name_of(process.wait())}")
        if failed:
            child.end()
            raise value
        return replace(child, started_at=time.monotonic()), value


def build_isolated(config: ModelConfig, *, cache_dir: Path | None, log_format: str, log_level: str) -> BuiltModel:
    """Load a model in a process of its own, or several; as `build`.

    Raises:
        ModelLoadError: with a message that may be shown to clients.
    """

    def build_one(config: ModelConfig) -> BuiltModel:
        engine = IsolatedEngine(config, cache_dir=cache_dir, log_format=log_format, log_level=log_level)
        return replace(engine.loaded.built, engine=engine)

    return on_all_devices(config, build_one)


def _name_of(code: int) -> str:
    """How a process ended, by what `Popen.wait` returns."""
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code}"


def _rss_bytes(pid: int) -> int:
    """A process's resident memory; 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
