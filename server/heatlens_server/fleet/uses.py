"""Who uses models, and the end of those that serve no longer: they are closed once nobody does."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Protocol

from heatlens_server.core.errors import ModelUnloaded
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue

_log = logging.getLogger(__name__)


class EndStreams(Protocol):
    """Ends streams of a model, with an error: all, or those that asked to end when their model is replaced."""

    def __call__(self, model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
        """See `api.stream.open_streams.OpenStreams.end_streams_of`."""


def end_nothing(model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
    """Where there are no streams."""


class Uses:
    """Counts the calls and streams of each model. Belongs to the event loop.

    Attributes:
        end_streams: ends streams of a model.
    """

    def __init__(self, end_streams: EndStreams, replaced_streams_s: float, clock: Callable[[], float]) -> None:
        """Nobody uses anything.

        Args:
            end_streams: ends streams of a model.
            replaced_streams_s: how long streams may go on with a model that was replaced, in seconds.
            clock: tells the time in seconds.
        """
        self.end_streams = end_streams
        self._replaced_streams_s = replaced_streams_s
        self._clock = clock
        self._users: dict[ModelQueue, _Users] = {}
        # Of models that serve no longer and are not closed yet.
        self._retired: dict[ModelQueue, ServedModel] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def retired(self) -> tuple[ServedModel, ...]:
        """The models that serve no longer, and are not closed yet."""
        return tuple(self._retired.values())

    def begin(self, queue: ModelQueue) -> None:
        """Count the users of a model from now on."""
        self._users[queue] = _Users(self._clock)

    def idle_s(self, model: ServedModel) -> float | None:
        """For how long nobody has used a model that serves, in seconds; None if somebody does."""
        users = self._users[model.queue]
        return self._clock() - users.last_at if users.gone.is_set() else None

    def supersede(self, old: ServedModel) -> None:
        """Retire a model in whose place another answers: its streams go on for a while, unless they asked to end."""
        error = ModelUnloaded.by_another(old.name)
        self.end_streams(old, error, only_if_asked=True)
        ending = asyncio.get_running_loop().call_later(self._replaced_streams_s, self.end_streams, old, error)
        self.retire(old, error).add_done_callback(lambda _: ending.cancel())

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
        self._retired[model.queue] = model
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
        del self._retired[queue]
        del self._users[queue]


class _Users:
    """Counts the calls that use a model: `with users:` around each."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._count = 0
        self.last_at = clock()
        self.gone = asyncio.Event()
        self.gone.set()

    def __enter__(self) -> None:
        self._count += 1
        self.gone.clear()

    def __exit__(self, *_error: object) -> None:
        self._count -= 1
        self.last_at = self._clock()
        if not self._count:
            self.gone.set()
