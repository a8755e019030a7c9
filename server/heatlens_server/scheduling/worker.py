"""The two threads of one engine: one prepares the next batch while the other runs the present one."""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heatlens_server.core.arrays import UInt8Array
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import HeatlensError
from heatlens_server.core.results import ImageResult
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Complete, Entry, Outcome, QueueResult, Timing
from heatlens_server.scheduling.outcome import as_domain_error, checked
from heatlens_server.scheduling.progress import Progress
from heatlens_server.scheduling.stepper import Stepper

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Batch:
    entries: list[Entry]
    images: UInt8Array


class Worker:
    """Runs the batches and steps of a batcher on an engine until the batcher is closed and empty."""

    def __init__(
        self, engine: SteppingEngine, batcher: Batcher, complete: Complete, *, name: str, step_rows: int
    ) -> None:
        """Make the threads; `start` starts them.

        Args:
            engine: only ever called by the device thread.
            batcher: where batches come from.
            complete: takes a batch's outcomes; what it raises is logged and harms nothing.
            name: the model's name, for thread names and logs.
            step_rows: the most rows that a step runs the model on.
        """
        self._engine = engine
        self._batcher = batcher
        self._complete = complete
        self._name = name
        self._slot: queue.SimpleQueue[_Batch | Entry | Progress | None] = queue.SimpleQueue()
        self._stepper = Stepper(engine, rows=step_rows, name=name, discard=self._slot.put)
        # One batch may be prepared ahead, not two: the place is reserved before the batch is closed.
        self._place = threading.Semaphore(1)
        self._threads = [
            threading.Thread(target=self._prepare_batches, name=f"prepare-{name}", daemon=True),
            threading.Thread(target=self._run_all, name=f"device-{name}", daemon=True),
        ]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for both threads to end, which they do once the batcher is closed and empty.

        Returns:
            False if the time ran out.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _prepare_batches(self) -> None:
        while True:
            self._place.acquire()
            entries = self._batcher.take()
            if entries is None:
                self._slot.put(None)
                return
            if entries[0].spec.in_steps:
                self._slot.put(entries[0])
                continue
            try:
                images = np.stack([entry.image.pixels for entry in entries if entry.image is not None])
            except BaseException as error:
                _log.exception("model %s: could not stack a batch of %d", self._name, len(entries))
                self._place.release()
                self._finish([(entry, as_domain_error(error)) for entry in entries])
                continue
            self._slot.put(_Batch(entries, images))

    def _run_all(self) -> None:
        while (work := self._slot.get()) is not None:
            if isinstance(work, _Batch):
                self._run_batch(work)
            elif isinstance(work, Progress):
                self._stepper.close(work)
            else:
                self._run_step(work)
            del work  # or what it holds would live until there is work again

    def _run_batch(self, batch: _Batch) -> None:
        self._batcher.device_started(len(batch.entries))
        # Only now may the next batch be closed: until here, arrivals could still join it.
        self._place.release()
        try:
            outcomes = self._run(batch)
        except BaseException as error:  # whatever a model does, its thread serves the next batch
            _log.exception("model %s: a batch of %d failed", self._name, len(batch.entries))
            outcomes = [(entry, as_domain_error(error)) for entry in batch.entries]
        self._batcher.device_finished()
        self._finish(outcomes)

    def _run_step(self, entry: Entry) -> None:
        if entry.image is None:  # given up since it was claimed
            self._place.release()
            self._batcher.finish(entry)
            self._stepper.end(entry)
            return
        self._batcher.device_started(1, step=True)
        self._place.release()
        outcome = self._stepper.advance(entry)
        if outcome is None:
            if not self._batcher.put_back(entry):
                self._stepper.end(entry)
            self._batcher.device_finished()
            return
        self._stepper.end(entry)
        wanted = self._batcher.finish(entry)
        self._batcher.device_finished()
        if wanted:
            self._finish([(entry, outcome)])

    def _run(self, batch: _Batch) -> list[tuple[Entry, Outcome]]:
        started_at = time.monotonic()
        results = self._explain(batch.entries, batch.images)
        compute_s = time.monotonic() - started_at
        outcomes: list[tuple[Entry, Outcome]] = []
        for entry, result in zip(batch.entries, results, strict=True):
            if isinstance(result, Exception):
                outcomes.append((entry, result))
                continue
            assert entry.image is not None
            timing = Timing(
                preprocess_s=entry.preprocess_s,
                queue_s=max(0.0, started_at - entry.enqueued_at),
                compute_s=compute_s,
                batch_size=len(batch.entries),
            )
            outcomes.append((entry, QueueResult(result, entry.image, timing)))
        return outcomes

    def _explain(self, entries: Sequence[Entry], images: UInt8Array) -> list[ImageResult | Exception]:
        """Run a batch; if it fails, run its halves, so that one bad image fails alone and memory may suffice."""
        try:
            results = self._engine.explain(images, [entry.target for entry in entries], entries[0].spec)
        except BaseException as error:
            if len(entries) == 1:
                if not isinstance(error, MemoryError | HeatlensError):
                    _log.exception("model %s: the engine failed on an image", self._name)
                return [as_domain_error(error)]
            _log.warning("model %s: a batch of %d failed (%s); running its halves", self._name, len(entries), error)
            middle = len(entries) // 2
            return [
                *self._explain(entries[:middle], images[:middle]),
                *self._explain(entries[middle:], images[middle:]),
            ]
        return [checked(result) for result in results]

    def _finish(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        try:
            self._complete(outcomes)
        except Exception:
            _log.exception("model %s: could not deliver %d outcomes", self._name, len(outcomes))
