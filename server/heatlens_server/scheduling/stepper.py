"""Explaining in steps: one entry at a time, one run of the model at a time. All of it on the device thread."""

import logging
import time
from collections.abc import Callable

from heatlens_server.core.engine import SteppingEngine
from heatlens_server.core.errors import HeatlensError
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.scheduling.entry import Entry, Outcome, QueueResult, Timing
from heatlens_server.scheduling.outcome import as_domain_error, checked
from heatlens_server.scheduling.progress import Progress

_log = logging.getLogger(__name__)


class Stepper:
    """Runs single steps of entries whose spec is `in_steps`. What is kept between them is on the entry."""

    def __init__(self, engine: SteppingEngine, *, rows: int, name: str, discard: Callable[[Progress], None]) -> None:
        """Run nothing yet.

        Args:
            engine: only ever called by the thread that calls `advance`.
            rows: the most rows that a step runs the model on.
            name: the model's name, for logs.
            discard: see `Progress.discard`.
        """
        self._engine = engine
        self._rows = rows
        self._name = name
        self._discard = discard

    def advance(self, entry: Entry) -> Outcome | None:
        """Run an entry's next step.

        Out of memory, the image is begun anew with half the rows, when its turn comes again.

        Returns:
            How it ended; None if there is more to do, or if nobody wants it any more.
        """
        image = entry.image
        if image is None:
            return None  # given up since it was claimed
        started_at = time.monotonic()
        progress = entry.steps
        if progress is None:
            queue_s = max(0.0, started_at - entry.enqueued_at)
            progress = entry.steps = Progress(self._rows, queue_s, self._discard)
        found: ImageResult | Exception | None = None
        try:
            found = self._next(progress, entry, image)
        except MemoryError as error:
            self.close(progress)
            if progress.rows == 1:
                return as_domain_error(error)
            progress.rows //= 2
            _log.warning("model %s: out of memory; begun anew with %d rows a step", self._name, progress.rows)
        except HeatlensError as error:
            return error
        except BaseException as error:  # whatever a model does, its thread serves others
            _log.exception("model %s: the engine failed on an image", self._name)
            return as_domain_error(error)
        progress.compute_s += time.monotonic() - started_at
        if found is None or isinstance(found, Exception):
            return found
        timing = Timing(
            preprocess_s=entry.preprocess_s, queue_s=progress.queue_s, compute_s=progress.compute_s, batch_size=1
        )
        return QueueResult(found, image, timing)

    def end(self, entry: Entry) -> None:
        """Let go of what is kept of an entry that is done, failed or given up."""
        if entry.steps is not None:
            self.close(entry.steps)
            entry.steps = None

    def close(self, progress: Progress) -> None:
        """Free what an unfinished explanation holds; nothing happens if there is none."""
        steps, progress.steps = progress.steps, None
        if steps is None:
            return
        try:
            steps.close()
        except BaseException:
            _log.exception("model %s: an explanation could not be given up cleanly", self._name)

    def _next(self, progress: Progress, entry: Entry, image: FittedImage) -> ImageResult | Exception | None:
        if progress.steps is None:
            # A copy, as batches are: the pixels may be a view of the request, which torch does not take, and are not
            # to be changed.
            pixels = image.pixels.copy()
            progress.steps = self._engine.steps(pixels, entry.target, entry.spec, rows=progress.rows)
        try:
            next(progress.steps)
        except StopIteration as stop:
            return checked(stop.value)
        return None
