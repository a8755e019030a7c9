"""One submitted image, as its caller holds it: to wait for the answer, or to take the image back."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from heatlens_server.errors import InternalError
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.serving.batcher import Batcher
from heatlens_server.serving.entry import Completed, Entry, EntryState, Outcome


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


class Ticket:
    """An image on its way through a lane. Belongs to the event loop; made by `Lane.submit`.

    Nobody has to await it: an error that nobody asks for is dropped without a word.
    """

    __slots__ = ("_batcher", "_entry", "_future")

    def __init__(
        self, batcher: Batcher, admit: Callable[[Callable[[Outcome], None]], Entry], loop: asyncio.AbstractEventLoop
    ) -> None:
        """Take a place in the queue.

        Args:
            batcher: whose queue.
            admit: makes the entry, given what takes its outcome on the event loop. What it raises is raised here.
            loop: the event loop.
        """
        self._batcher = batcher
        self._future: asyncio.Future[Completed] = loop.create_future()
        self._entry = admit(self._resolve)

    @property
    def entry(self) -> Entry:
        """The place in the queue, for the lane."""
        return self._entry

    @property
    def waiting(self) -> bool:
        """Whether the image is being decoded or waits for a batch. Afterwards it runs, is answered or is given up."""
        return self._entry.state in (EntryState.PREPARING, EntryState.WAITING)

    def give_up(self, error: Exception) -> bool:
        """Take the image back, so that `result` raises `error` and the model is not run for it.

        Returns:
            False if it is too late, and nothing has changed: a batch has claimed the image, or it failed, expired or
            was given up before.
        """
        if not self._batcher.withdraw(self._entry):
            return False
        self._resolve(error)
        return True

    async def result(self) -> Explained:
        """Wait for the answer. Cancelling the wait takes the image back, as `give_up` does.

        Raises:
            DeadlineExpired: the timeout passed before the model ran.
            DeviceOutOfMemory: even alone the image did not fit.
            InternalError: the engine failed on this image.
            Exception: what preparing the image raised, or what `give_up` was told.
        """
        try:
            completed = await self._future
        except BaseException:
            # If the wait was cancelled, the place in the queue is free at once; batch mates notice nothing.
            self._batcher.withdraw(self._entry)
            raise
        if self._entry.image is None:
            raise InternalError("an entry completed without an image")
        return Explained(completed, self._entry.image, self._entry.preprocess_s)

    def _resolve(self, outcome: Outcome) -> None:
        # A caller that went away has cancelled its future.
        if self._future.done():
            return
        if isinstance(outcome, Exception):
            self._future.set_exception(outcome)
            # Counts as retrieved: asyncio would otherwise complain about each error that nobody awaits.
            self._future.exception()
        else:
            self._future.set_result(outcome)
