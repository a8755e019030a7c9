"""Pulls from an iterator that may block, without holding up the event loop."""

import asyncio
import queue
import threading
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

Item = TypeVar("Item")

_END: Any = object()


class Puller(Generic[Item]):
    """An asynchronous iterator over a blocking one.

    Items are pulled one at a time, when asked for, all in one daemon thread: unlike a thread of asyncio's pool, one
    that hangs in a camera's driver keeps neither the event loop nor the process from ending.
    """

    def __init__(self, items: Iterator[Item]) -> None:
        self._items = items
        self._wanted: queue.SimpleQueue[asyncio.Future[Item] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, args=(loop,), name="heatlens-puller", daemon=True)
            self._thread.start()
        future: asyncio.Future[Item] = loop.create_future()
        self._wanted.put(future)
        item = await future
        if item is _END:
            raise StopAsyncIteration
        return item

    def close(self) -> None:
        """Let the thread end as soon as the iterator lets go of it. Idempotent."""
        self._wanted.put(None)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        while (future := self._wanted.get()) is not None:
            item, error = _END, None
            try:
                item = next(self._items)
            except StopIteration:
                pass
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(_hand_over, future, item, error)
            except RuntimeError:
                # The event loop is closed: nobody waits.
                return
            del future, item, error


def _hand_over(future: "asyncio.Future[Any]", item: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(item)
    else:
        future.set_exception(error)
