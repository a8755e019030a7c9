"""One device of a model: runs batches and single steps on its engine, and reports what ran.

Whatever an engine raises, the device goes on with the next batch: unless the model has other devices, and the engine
fails on an image of its own as well. Then the device is taken out, and another one runs what it has failed to run.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import DeviceOutOfMemory, HeatlensError, InternalError, ModelInterrupted
from heatlens_server.core.events import Observer
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Deliver, Entry, Outcome, Progress, QueueResult, Timing

_log = logging.getLogger(__name__)

_TRIALS = 2
"""How often an engine that has failed on a batch, or a step, is tried before its device is taken out."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one bucket, and their images stacked: (N, H, W, C)."""

    entries: list[Entry]
    images: ImageArray


class Device:
    """Runs what was claimed on one engine. All methods belong to one thread, the device's."""

    def __init__(
        self,
        engine: SteppingEngine,
        batcher: Batcher,
        *,
        index: int,
        model: str,
        step_rows: int,
        deliver: Deliver,
        discard: Callable[[Progress], None],
        hand_back: Callable[[Batch], None],
        try_out: Callable[[SteppingEngine], None],
        name: str,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Run nothing yet.

        Args:
            engine: called by the device's thread only.
            batcher: what was claimed comes from it; is told what begins and ends.
            index: of this device among the model's.
            model: the model's name, for logs and events.
            step_rows: the most rows that a step runs the model on.
            deliver: takes outcomes; must not raise.
            discard: see `Progress.discard`; must lead to `free`.
            hand_back: has another device run a batch.
            try_out: has an engine explain an image of nobody's; raises anything if it cannot.
            name: the device's, for events.
            observer: is told of batches and steps; must not raise.
            clock: the batcher's: seconds, monotonic.
        """
        self._engine = engine
        self._batcher = batcher
        self._index = index
        self._model = model
        self._name = name
        self._step_rows = step_rows
        self._deliver = deliver
        self._discard = discard
        self._hand_back = hand_back
        self._try_out = try_out
        self._observer = observer
        self._clock = clock

    def run_batch(self, batch: Batch) -> None:
        """Run a batch and deliver its outcomes."""
        size = len(batch.entries)
        self._batcher.begin(self._index, batch.entries)
        self._observer.batch_started(model=self._model, device=self._name, size=size)
        started_at = self._clock()
        try:
            outcomes = self._outcomes(batch, started_at)
        except BaseException as error:
            _log.exception("model %s: a batch of %d failed", self._model, size)
            outcomes = [(entry, as_domain_error(error)) for entry in batch.entries]
        duration_s = self._clock() - started_at
        again = all(_is_fault(outcome) for _, outcome in outcomes) and self._is_out(outcomes[0][1])
        self._batcher.end_batch(self._index, again=again)
        if again:
            outcomes = []
            self._hand_back(batch)
        spec, pixel_count = batch.entries[0].spec, batch.images.shape[1] * batch.images.shape[2]
        count = max(entry.target.count for entry in batch.entries)
        self._batcher.pace.learn_batch(spec, size, pixel_count, duration_s, count=count)
        self._deliver(outcomes)
        failed = sum(isinstance(outcome, Exception) for _, outcome in outcomes)
        self._observer.batch_ended(
            model=self._model,
            device=self._name,
            size=size,
            failed=failed,
            duration_s=duration_s,
            traces=[entry.trace for entry in batch.entries if entry.trace is not None],
        )

    def run_step(self, entry: Entry) -> None:
        """Run an entry's next step, which is as many runs of the model as there is time for.

        The outcome is delivered if it was the last one.
        """
        if not self._batcher.begin(self._index, [entry]):
            self._end(entry)
            return
        started_at = run_at = self._clock()
        outcome = self._advance(entry)
        while outcome is None and self._batcher.goes_on(self._index, entry, (now := self._clock()) - run_at):
            run_at = now
            outcome = self._advance(entry)
        duration_s = self._clock() - started_at
        if outcome is None:
            if not self._batcher.put_back(self._index, entry):
                self._end(entry)
        elif _is_fault(outcome) and self._is_out(outcome):
            self._end(entry)
            self._batcher.put_back(self._index, entry, anew=True)
        else:
            self._end(entry)
            if self._batcher.finish(self._index, entry):
                self._deliver([(entry, outcome)])
        self._observer.step_ended(model=self._model, device=self._name, duration_s=duration_s, trace=entry.trace)

    def works(self) -> bool:
        """Whether the engine explains an image of nobody's."""
        try:
            self._try_out(self._engine)
        except BaseException as error:
            _log.warning("model %s: %s fails: %r", self._model, self._name, error)
            return False
        return True

    def refuse_step(self, entry: Entry) -> None:
        """Leave an entry to another device, as this one was taken out since its step was claimed."""
        waits = self._batcher.begin(self._index, [entry])
        self._end(entry)
        if waits:
            self._batcher.put_back(self._index, entry, anew=True)

    def free(self, progress: Progress) -> None:
        """Free what an unfinished explanation holds; nothing happens if it holds nothing."""
        steps, progress.steps = progress.steps, None
        if steps is None:
            return
        try:
            steps.close()
        except BaseException:
            _log.exception("model %s: an explanation could not be given up cleanly", self._model)

    def _is_out(self, fault: Outcome) -> bool:
        """Find out whether a fault is the device's, and take it out then.

        An image of nobody's tells: an image that no engine can explain harms its own caller alone.

        Returns:
            Whether another device is to run what has failed. What has ended a process is not given to another one.
        """
        if len(self._batcher.devices) == 1 or self._batcher.closed:
            return False
        crashed = isinstance(fault, ModelInterrupted)
        if not crashed and any(self.works() for _ in range(_TRIALS)):
            return False
        others = self._batcher.devices.take_out(self._index, "its process has ended" if crashed else "its runs fail")
        return others and not crashed

    def _outcomes(self, batch: Batch, started_at: float) -> list[tuple[Entry, Outcome]]:
        results = self._explain(batch.entries, batch.images)
        compute_s = self._clock() - started_at
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
                began_at=started_at,
                ended_at=started_at + compute_s,
            )
            outcomes.append((entry, QueueResult(result, entry.image, timing)))
        return outcomes

    def _explain(self, entries: Sequence[Entry], images: ImageArray) -> list[ImageResult | Exception]:
        """Run a batch; if it fails, run its halves, so that one bad image fails alone and memory may suffice."""
        try:
            results = self._engine.explain(images, [entry.target for entry in entries], entries[0].spec)
        except BaseException as error:
            # Where no engine is, there is nothing to run halves.
            if len(entries) == 1 or isinstance(error, ModelInterrupted):
                if not isinstance(error, MemoryError | HeatlensError):
                    _log.exception("model %s: the engine failed on an image", self._model)
                return [as_domain_error(error)] * len(entries)
            _log.warning("model %s: a batch of %d failed (%s); running its halves", self._model, len(entries), error)
            middle = len(entries) // 2
            return [
                *self._explain(entries[:middle], images[:middle]),
                *self._explain(entries[middle:], images[middle:]),
            ]
        return [_finite(result) for result in results]

    def _advance(self, entry: Entry) -> Outcome | None:
        """Run the model for an entry once more.

        Out of memory, the explanation is begun anew with half the rows, when its turn comes again.

        Returns:
            How it ended; None if there is more to do, or if its caller has left.
        """
        image = entry.image
        if image is None:
            return None  # given up since the step began
        started_at = self._clock()
        progress = entry.steps
        if progress is None:
            queue_s = max(0.0, started_at - entry.enqueued_at)
            rows = self._batcher.pace.rows(entry.spec, image.pixel_count, self._step_rows)
            progress = entry.steps = Progress(rows, queue_s, self._discard)
        found: ImageResult | Exception | None = None
        try:
            found = self._next(progress, entry, image)
        except MemoryError as error:
            self.free(progress)
            if progress.rows == 1:
                return as_domain_error(error)
            progress.rows, progress.runs, progress.later_s = progress.rows // 2, 0, 0.0
            _log.warning("model %s: out of memory; begun anew with %d rows a step", self._model, progress.rows)
        except HeatlensError as error:
            return error
        except BaseException as error:
            _log.exception("model %s: the engine failed on an image", self._model)
            return as_domain_error(error)
        else:
            # The first run prepares (the forward pass of all goals, sessions), and the last one finishes maps.
            if progress.runs and found is None:
                # The mean: gradients take long, and the maps that follow them do not.
                progress.later_s += self._clock() - started_at
                run_s = progress.later_s / progress.runs
                self._batcher.pace.learn_run(entry.spec, progress.rows, image.pixel_count, run_s)
            progress.runs += 1
        progress.compute_s += self._clock() - started_at
        if found is None or isinstance(found, Exception):
            return found
        timing = Timing(
            preprocess_s=entry.preprocess_s,
            queue_s=progress.queue_s,
            compute_s=progress.compute_s,
            batch_size=1,
            began_at=entry.enqueued_at + progress.queue_s,
            ended_at=self._clock(),
        )
        return QueueResult(found, image, timing)

    def _next(self, progress: Progress, entry: Entry, image: FittedImage) -> ImageResult | Exception | None:
        if progress.steps is None:
            # A copy, as batches are: the pixels may be a view of the request, which torch does not take, and must not
            # be changed.
            pixels = image.pixels.copy()
            progress.steps = self._engine.steps(pixels, entry.target, entry.spec, rows=progress.rows)
        try:
            next(progress.steps)
        except StopIteration as stop:
            return _finite(stop.value)
        return None

    def _end(self, entry: Entry) -> None:
        """Let go of what is kept of an entry that is done, failed or given up."""
        if entry.steps is not None:
            self.free(entry.steps)
            entry.steps = None


def as_domain_error(error: BaseException) -> HeatlensError:
    """What an engine raised on a single image, as an error that callers get."""
    if isinstance(error, HeatlensError):
        return error
    if isinstance(error, MemoryError):
        return DeviceOutOfMemory("the device has not enough memory for this image", retry_after_s=1.0)
    return InternalError(f"the engine failed: {error!r}")


def _is_fault(outcome: Outcome) -> bool:
    """Whether it may be the device that has failed, and not what was asked of it."""
    return isinstance(outcome, InternalError | DeviceOutOfMemory | ModelInterrupted)


def _finite(result: ImageResult) -> ImageResult | Exception:
    """The result; an error in its place if a score or map is not finite."""
    if not result.is_finite:
        return InternalError("the model gave a score or map that is not finite")
    return result
