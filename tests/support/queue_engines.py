"""Fake engines for tests of a model's queue: they answer an image with its own pixel value, when they are told to."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from heatlens_server.core.engine import MapSpec, Steps
from heatlens_server.core.events import Observer
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.device_threads import DeviceThreads
from heatlens_server.scheduling.entry import Entry, Outcome, QueueResult
from heatlens_server.scheduling.pace import Pace

BATCHED = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
STEPPED = MapSpec(Method.SCORE_CAM, ("layer",), upsample=False)
POISON, NOT_FINITE, STUBBORN = 255, 254, 253
PATIENCE_S = 20


def image(value: int) -> FittedImage:
    """An image that a fake engine answers with `value`; read-only, as the pixels of a request are."""
    pixels = np.full((2, 2, 3), value, np.uint8)
    pixels.flags.writeable = False
    return FittedImage(pixels=pixels, region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2)


def result(value: float) -> ImageResult:
    """What a fake engine says about an image of a value."""
    one = np.zeros(1, np.float32)
    logits = np.array([np.nan if value == NOT_FINITE else value], np.float32)
    return ImageResult(logits, (0,), np.zeros((1, 1, 1), np.float32), one, one)


class EachRun(Pace):
    """Each run of the model is a step, with all rows, whatever it takes."""

    def rows(self, spec: MapSpec, pixel_count: int, most: int) -> int:
        """All."""
        return most

    def most_s(self, *, others_wait: bool) -> float:
        """No time for another run."""
        return 0.0


class Rig:
    """The threads of a model's devices on a batcher; `start` starts them.

    Attributes:
        outcomes: of each entry that was delivered.
        events: what the observer was told: the event's name and the device.
        changes: the devices that were taken out, and why, or put in.
    """

    def __init__(
        self,
        *engines: "BatchEngine",
        max_batch_size: int = 8,
        pace: Pace | None = None,
        try_out: Callable[["BatchEngine"], None] = lambda _engine: None,
    ) -> None:
        self.engines = engines
        self.outcomes: dict[Entry, Outcome] = {}
        self.events: list[tuple[str, str]] = []
        self.changes: list[tuple[int, str]] = []
        self.failures_to_raise = 0
        self._changed = threading.Condition()
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=0.0,
            max_queue_length=99,
            deliver=self._deliver,
            device_count=len(engines),
            on_device=lambda index, fault: self.changes.append((index, fault)),
            pace=pace or EachRun(),
        )
        self._threads = DeviceThreads(
            engines,
            self.batcher,
            self._deliver,
            model="m",
            step_rows=max_batch_size,
            observer=_Recorder(self.events),
            try_out=try_out,
        )
        self.start, self.join = self._threads.start, self._threads.join

    def put(self, value: int, spec: MapSpec = BATCHED) -> Entry:
        """Queue an image."""
        entry = self.batcher.admit(TopK(1), spec, deadline=None, resolve=lambda outcome: None)
        self.batcher.put(entry, image(value))
        return entry

    def outcome(self, entry: Entry) -> Outcome:
        """Wait for an entry's outcome."""
        with self._changed:
            assert self._changed.wait_for(lambda: entry in self.outcomes, PATIENCE_S)
        return self.outcomes[entry]

    def value(self, entry: Entry) -> float:
        """Wait for an entry's result, and return the value that it says."""
        outcome = self.outcome(entry)
        assert isinstance(outcome, QueueResult), outcome
        return float(outcome.result.logits[0])

    def stop(self) -> None:
        """Finish what there is."""
        self.batcher.close()
        assert self.join(PATIENCE_S)

    def _deliver(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        with self._changed:
            assert not self.outcomes.keys() & {entry for entry, _ in outcomes}
            self.outcomes.update(outcomes)
            self._changed.notify_all()
        if self.failures_to_raise:
            self.failures_to_raise -= 1
            raise RuntimeError("callback failed")


class _Recorder(Observer):
    def __init__(self, events: list[tuple[str, str]]) -> None:
        self._events = events

    def batch_started(self, *, model: str, device: str, size: int) -> None:
        self._events.append((f"batch of {size} started", device))

    def batch_ended(
        self, *, model: str, device: str, size: int, failed: int, duration_s: float, traces: object
    ) -> None:
        assert model == "m"
        assert duration_s >= 0
        self._events.append((f"batch of {size} ended, {failed} failed", device))

    def step_ended(self, *, model: str, device: str, duration_s: float, trace: object) -> None:
        assert model == "m"
        assert duration_s >= 0
        self._events.append(("step ended", device))


def eventually(condition: Callable[[], object]) -> None:
    """Wait for other threads."""
    pause = threading.Event()
    for _ in range(PATIENCE_S * 1000):
        if condition():
            return
        pause.wait(0.001)
    raise AssertionError("it did not happen")


async def until(condition: Callable[[], object]) -> None:
    """Wait for other threads."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.001)


class BatchEngine:
    """Answers batches while its gate is open, as it is at first. Fails on POISON.

    Attributes:
        entered: set once a batch has come.
        seen: the values of every batch that ran.
        closed: how often it was closed.
    """

    def __init__(self, *, memory: int = 100, device: str = "cpu") -> None:
        """Run out of memory above `memory` images."""
        self.info = SimpleNamespace(device=device)
        self.memory = memory
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.seen: list[list[int]] = []
        self.closed = 0

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        """Each image's own value."""
        assert len(targets) == len(images)
        values = [int(value) for value in images[:, 0, 0, 0]]
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        self.seen.append(values)
        if len(values) > self.memory:
            raise MemoryError
        if POISON in values:
            raise ValueError("secret")
        return [result(value) for value in values]

    def is_loaded_for(self, spec: MapSpec) -> bool:
        """There is nothing to load."""
        return True

    def close(self) -> None:
        """Count it."""
        self.closed += 1


class StepEngine(BatchEngine):
    """Answers each image after `count` steps and a last one; each waits for a permit. Batches run at once.

    POISON fails in its second step, STUBBORN when it is given up. More than `memory` rows are out of memory, in the
    second step too.

    Attributes:
        permits: one for each step that may go on.
        inside: released by each step that comes.
        taken: steps that were begun.
        live: explanations that hold something.
        begun: the value and the rows of each explanation that was begun.
        freed_by: the thread that freed each explanation that was given up.
    """

    def __init__(self, *, count: int = 3, memory: int = 100, device: str = "cpu") -> None:
        super().__init__(device=device)
        self.count, self.step_memory = count, memory
        self.permits, self.inside = threading.Semaphore(0), threading.Semaphore(0)
        self.taken = self.live = 0
        self.begun: list[tuple[int, int]] = []
        self.freed_by: list[str] = []
        self._running = 0
        self._all_run = False

    def steps(self, pixels: np.ndarray, target: Target, spec: MapSpec, *, rows: int) -> Steps:
        """The image's own value, in the end."""
        assert pixels.flags.writeable
        value = int(pixels[0, 0, 0])
        self.begun.append((value, rows))
        self.live += 1
        try:
            i = 0
            while i < self.count:
                self._run()
                if i and value == POISON:
                    raise ValueError("secret")
                if i and rows > self.step_memory:
                    raise MemoryError
                yield
                i += 1
            self._run()
            return result(value)
        except GeneratorExit:
            assert not self._running
            self.freed_by.append(threading.current_thread().name)
            if value == STUBBORN:
                raise RuntimeError("cannot be given up") from None
            raise
        finally:
            self.live -= 1

    def run_all(self) -> None:
        """Let all further steps go."""
        self._all_run = True
        self.permits.release()

    def _run(self) -> None:
        self._running += 1
        self.taken += 1
        self.inside.release()
        assert self._all_run or self.permits.acquire(timeout=PATIENCE_S)
        self._running -= 1
