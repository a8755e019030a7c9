"""Who uses models, and the end of those that serve no longer: they are closed once nobody does."""

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue

_log = logging.getLogger(__name__)


class Uses:
    """Counts the calls and streams of each model. Belongs to the event loop."""

    def __init__(self) -> None:
        """Nobody uses anything."""
        self._users: dict[ModelQueue, _Users] = {}
        # Of models that serve no longer and are not closed yet.
        self._retired: set[ModelQueue] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def retired(self) -> tuple[ModelQueue, ...]:
        """The queues of models that serve no longer, and are not closed yet."""
        return tuple(self._retired)

    def begin(self, queue: ModelQueue) -> None:
        """Count the users of a model from now on."""
        self._users[queue] = _Users()

    @contextlib.contextmanager
    def of(self, model: ServedModel) -> Iterator[ServedModel]:
        """Use a model: it is not closed before the end of the block."""
        with self._users[model.queue]:
            yield model

    def retire(self, model: ServedModel, error: Exception) -> "asyncio.Task[None]":
        """Close a model that serves no longer, once its calls are done.

        Args:
            model: it.
            error: what those are told that come to it too late, or that a batch that hangs keeps waiting.
        """
        self._retired.add(model.queue)
        task = asyncio.create_task(self._finish(model, error))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _finish(self, model: ServedModel, error: Exception) -> None:
        queue, users = model.queue, self._users[model.queue]
        while not users.gone.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(users.gone.wait(), model.hang_after_s)
            if queue.batcher.devices.hangs_s(model.hang_after_s):
                queue.give_up(error, running=True)
        if not await queue.close(error, timeout_s=model.hang_after_s):
            _log.error("model %s: what it runs does not end, and keeps its thread and memory", model.name)
        self._retired.discard(queue)
        del self._users[queue]


class _Users:
    """Counts the calls that use a model: `with users:` around each."""

    def __init__(self) -> None:
        self._count = 0
        self.gone = asyncio.Event()
        self.gone.set()

    def __enter__(self) -> None:
        self._count += 1
        self.gone.clear()

    def __exit__(self, *_error: object) -> None:
        self._count -= 1
        if not self._count:
            self.gone.set()
