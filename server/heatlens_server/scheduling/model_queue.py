"""One model's way from an awaiting caller to its device and back: admission, preparation, queue, result."""

import asyncio
import functools
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import DeadlineExpired
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.targets import Target
from heatlens_server.scheduling.batcher import Batcher
from heatlens_server.scheduling.entry import Entry, Outcome, QueueResult, Source
from heatlens_server.scheduling.preparation import Preparation
from heatlens_server.scheduling.readiness import Readiness
from heatlens_server.scheduling.ticket import Ticket, resolve
from heatlens_server.scheduling.worker import Worker


class ModelQueue:
    """Explains images with one engine. Its methods belong to the event loop that the queue was made on."""

    def __init__(
        self,
        engine: SteppingEngine,
        *,
        name: str,
        preparers: Executor,
        max_batch_size: int,
        max_delay_s: float,
        max_queue_length: int,
        max_preparing: int | None = None,
    ) -> None:
        """Start the engine's threads. Must be called on the event loop.

        Args:
            engine: owned by the queue from now on.
            name: the model's name.
            preparers: threads that decode and resize.
            max_batch_size: most images in a batch, and most rows in a step.
            max_delay_s: the batching window, in seconds.
            max_queue_length: most requests admitted and not running, those of streams aside.
            max_preparing: most images decoded at the same time; None: one per CPU.
        """
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._preparation = Preparation(preparers, self._prepare, at_once=max_preparing or os.cpu_count() or 1)
        self.batcher = Batcher(
            max_batch_size=max_batch_size,
            max_delay_s=max_delay_s,
            max_queue_length=max_queue_length,
            complete=self._complete,
        )
        self._readiness = Readiness(engine, name=name, max_waiting=max_queue_length)
        self._worker = Worker(engine, self.batcher, self._complete, name=name, step_rows=max_batch_size)
        self._worker.start()
        # One that nobody holds any more is nobody's to answer.
        self._tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()

    async def ensure(self, spec: MapSpec) -> None:
        """Have everything loaded that a spec needs; to be awaited before `submit`. Returns at once if that is so.

        Raises:
            CompanionFailed: it cannot be loaded; the next request tries again.
            QueueFull: too many wait for it already.
        """
        await self._readiness.ensure(spec)

    async def explain(
        self, prepare: Callable[[], FittedImage], target: Target, spec: MapSpec, *, timeout_s: float | None
    ) -> QueueResult:
        """Explain one image.

        Args:
            prepare: decodes and resizes; called on a preparer thread. What it raises is raised here.
            target: what is wanted.
            spec: how; everything that it needs is loaded.
            timeout_s: how long the caller will wait; the model is not run for it after that. None: for ever.

        Raises:
            QueueFull: at once, if too many are waiting.
            ServerDraining: the queue is closing.
            HeatlensError: see `Ticket.result`.
        """
        return await self.submit(prepare, target, spec, timeout_s=timeout_s).result()

    def submit(
        self,
        prepare: Callable[[], FittedImage],
        target: Target,
        spec: MapSpec,
        *,
        timeout_s: float | None,
        source: Source | None = None,
        complete: Callable[[FittedImage], Target] | None = None,
    ) -> Ticket:
        """Send one image on its way and return at once.

        Args:
            prepare: decodes and resizes; called on a preparer thread. What it raises is raised by `Ticket.result`.
            target: what is wanted.
            spec: how; everything that it needs is loaded.
            timeout_s: how long the caller will wait; the model is not run for it after that. With a source, how long
                the image may wait to be begun. None: for ever.
            source: the stream that the image belongs to. Streams and callers without one take turns, and images of
                streams take no place in the queue from callers: whoever owns the stream bounds them.
            complete: makes the target that the engine gets, of the prepared image, on the preparer thread; None if
                `target` is that. What it raises is raised by `Ticket.result`.

        Raises:
            QueueFull: too many are waiting; never for an image of a stream.
            ServerDraining: the queue is closing.
        """
        future: asyncio.Future[QueueResult] = self._loop.create_future()
        entry = self.batcher.admit(
            target,
            spec,
            deadline=None if timeout_s is None else time.monotonic() + timeout_s,
            resolve=functools.partial(resolve, future),
            source=source,
        )
        entry.prepare, entry.complete = prepare, complete
        try:
            self._preparation.add(entry)
        except BaseException:
            self.batcher.withdraw(entry)
            raise
        ticket = Ticket(entry, future, withdraw=self._withdraw)
        self._tickets.add(ticket)
        return ticket

    def give_up(self, error: Exception) -> None:
        """Refuse new work, and answer with an error all that was admitted, but for batches that are claimed already."""
        self.batcher.close(error)
        self._readiness.give_up(error)
        for ticket in list(self._tickets):
            ticket.give_up(error)

    async def close(self, refusal: Exception | None = None, *, timeout_s: float | None = None) -> bool:
        """Refuse new work, finish what was admitted, stop the threads and close the engine. Idempotent.

        Args:
            refusal: what refused work is told; None for ServerDraining.
            timeout_s: how long that may take, in seconds; None for ever.

        Returns:
            False if the time ran out, or a part of the model is still being loaded; the threads are daemons and end
            with the process.
        """
        self.batcher.close(refusal)
        finished = await asyncio.to_thread(self._worker.join, timeout_s)
        if finished:
            self._engine.close()
        return finished and not self._readiness.loading

    def _withdraw(self, entry: Entry) -> bool:
        withdrawn = self.batcher.withdraw(entry)
        if withdrawn:
            self._preparation.discard(entry)
        return withdrawn

    def _prepare(self, entry: Entry) -> None:
        """Decode on a preparer thread, then queue."""
        prepare, complete = entry.prepare, entry.complete
        if prepare is None:
            return  # withdrawn
        started_at = time.monotonic()
        try:
            image = _prepare_in_time(prepare, entry.deadline, started_at)
            if complete is not None:
                entry.target = complete(image)
        except Exception as error:
            if self.batcher.withdraw(entry):
                self._complete([(entry, error)])
            return
        entry.preprocess_s = time.monotonic() - started_at
        entry.prepare = entry.complete = None
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
