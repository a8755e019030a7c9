"""One model's way from an awaiting caller to its device and back: admission, preparation, queue, result."""

import asyncio
import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

from heatlens_server.engines.base import Engine, MapSpec, Target
from heatlens_server.errors import DeadlineExpired, InternalError
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.serving.batcher import Batcher
from heatlens_server.serving.entry import Completed, Entry, EntryState, Outcome
from heatlens_server.serving.worker import Worker


@dataclass(frozen=True, slots=True)
class Explained:
    """What a caller gets.

    Attributes:
        completed: the engine's result and the time in queue and device.
        image: the image as the model saw it, and where that lies in the source.
        preprocess_s: seconds of decoding and resizing.
    """

    completed: Completed
    image: FittedImage
    preprocess_s: float


class Lane:
    """Explains images with one engine. `explain` belongs to the event loop that the lane was made on."""

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        preparers: Executor,
        max_batch_size: int,
        max_delay_s: float,
        max_queue_length: int,
    ) -> None:
        """Start the engine's threads. Must be called on the event loop.

        Args:
            engine: owned by the lane from now on.
            name: the model's name.
            preparers: threads that decode and resize.
            max_batch_size: most images in a batch.
            max_delay_s: the batching window, in seconds.
            max_queue_length: most requests admitted and not running.
        """
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._preparers = preparers
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=max_queue_length,
            complete=self._complete,
        )
        self._worker = Worker(engine, self.batcher, self._complete, name=name)
        self._worker.start()

    async def explain(
        self, prepare: Callable[[], FittedImage], target: Target, spec: MapSpec, *, timeout_s: float | None
    ) -> Explained:
        """Explain one image.

        Args:
            prepare: decodes and resizes; called on a preparer thread. What it raises is raised here.
            target: the classes wanted.
            spec: method, layers and map size.
            timeout_s: how long the caller will wait; the model is not run for it after that. None: for ever.

        Raises:
            QueueFull: at once, if too many are waiting.
            DeadlineExpired: the timeout passed before the model ran.
            ServerDraining: the lane is closing.
            DeviceOutOfMemory: even alone the image did not fit.
            InternalError: the engine failed on this image.
        """
        future: asyncio.Future[Completed] = self._loop.create_future()
        entry = self.batcher.admit(
            target,
            spec,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            resolve=functools.partial(_resolve, future),
        )
        try:
            self._preparers.submit(self._prepare, entry, prepare)
            completed = await future
        except BaseException:
            # Cancelled, or no preparer left: the place in the queue is given up, batch mates notice nothing.
            self.batcher.withdraw(entry)
            raise
        if entry.image is None:
            raise InternalError("an entry completed without an image")
        return Explained(completed, entry.image, entry.preprocess_s)

    async def close(self, *, timeout_s: float | None = None) -> bool:
        """Refuse new work, finish what was admitted, stop the threads and close the engine. Idempotent.

        Returns:
            False if the time ran out; the threads are daemons and end with the process.
        """
        self.batcher.close()
        finished = await asyncio.to_thread(self._worker.join, timeout_s)
        if finished:
            self._engine.close()
        return finished

    def _prepare(self, entry: Entry, prepare: Callable[[], FittedImage]) -> None:
        """Decode on a preparer thread, then queue."""
        if entry.state is not EntryState.PREPARING:
            return
        started_at = time.monotonic()
        try:
            image = _prepare_in_time(prepare, entry.deadline, started_at)
        except Exception as error:
            if self.batcher.withdraw(entry):
                self._complete([(entry, error)])
            return
        entry.preprocess_s = time.monotonic() - started_at
        self.batcher.put(entry, image)

    def _complete(self, outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
        """Hand outcomes to their callers, with one wake-up of the loop. Any thread may call this."""
        self._loop.call_soon_threadsafe(_resolve_all, outcomes)


def _prepare_in_time(prepare: Callable[[], FittedImage], deadline: float | None, now: float) -> FittedImage:
    if deadline is not None and deadline <= now:
        raise DeadlineExpired("the deadline passed before the image was decoded")
    return prepare()


def _resolve_all(outcomes: Sequence[tuple[Entry, Outcome]]) -> None:
    for entry, outcome in outcomes:
        entry.resolve(outcome)


def _resolve(future: "asyncio.Future[Completed]", outcome: Outcome) -> None:
    # A caller that went away has cancelled its future.
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
