"""One submitted image, as its caller holds it: to wait for the answer, or to take the image back."""

import asyncio
from collections.abc import Callable

from heatlens_server.scheduling.entry import Entry, EntryState, Outcome, QueueResult


class Ticket:
    """An image on its way through a queue. Belongs to the event loop; made by `ModelQueue.submit`.

    It need not be awaited: an error that no caller asks for is dropped without a word.
    """

    __slots__ = ("__weakref__", "_entry", "_future", "_withdraw")

    def __init__(self, entry: Entry, future: asyncio.Future[QueueResult], *, withdraw: Callable[[Entry], bool]) -> None:
        """Hold a place in the queue.

        Args:
            entry: the place.
            future: resolved by `resolve`, on its event loop.
            withdraw: gives up the entry's place; False if it is too late.
        """
        self._entry = entry
        self._future = future
        self._withdraw = withdraw

    @property
    def peer(self) -> str | None:
        """The connection that the image came by, empty if that is not known; None for an image of a stream."""
        return self._entry.peer if self._entry.source is None else None

    @property
    def entry(self) -> Entry:
        """Its place in the queue."""
        return self._entry

    @property
    def waiting(self) -> bool:
        """Whether the image is being decoded or waits to be run. Afterwards it runs, is answered or is given up.

        An image that waits between two of its steps counts as running: so much was done for it already.
        """
        return self._entry.state in (EntryState.DECODING, EntryState.WAITING) and not self._entry.begun

    def give_up(self, error: Exception) -> bool:
        """Take the image back, so that `result` raises `error` and the model is not run for it.

        Returns:
            False if it is too late, and nothing has changed: a batch has claimed the image, or it failed, expired or
            was given up before. An image in steps can be taken back until its last step is done.
        """
        if not self._withdraw(self._entry):
            return False
        resolve(self._future, error)
        return True

    def abandon(self, error: Exception) -> None:
        """Make `result` raise an error at once, wherever the image is. If it runs, its result is dropped."""
        if not self.give_up(error):
            resolve(self._future, error)

    async def result(self) -> QueueResult:
        """Wait for the answer. Cancelling the wait takes the image back, as `give_up` does.

        Raises:
            DeadlineExpired: the timeout passed before the model ran.
            DeviceOutOfMemory: even alone the image did not fit.
            InternalError: the engine failed on this image.
            Exception: what decoding the image raised, or what `give_up` was told.
        """
        try:
            return await self._future
        except BaseException:
            # If the wait was cancelled, the place in the queue is free at once; others of the batch notice nothing.
            self._withdraw(self._entry)
            # The error's traceback holds this frame. Without a way back to the future, which holds the error, frames
            # dropped by the thousand are free at once instead of when the garbage collector comes.
            del self
            raise


def resolve(future: asyncio.Future[QueueResult], outcome: Outcome) -> None:
    """Give a ticket's future its outcome; nothing happens if it has one. Call it on the future's loop."""
    # A caller that has left has cancelled its future.
    if future.done():
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
        # Counts as retrieved: asyncio would otherwise complain about each error that no caller awaits.
        future.exception()
    else:
        future.set_result(outcome)
