"""One run of a stream's `map`: the caller's frames, and the thread or task that pulls them beside the caller's loop."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from typing import Any, Generic, Self, TypeVar

from heatlens._results.images import ImageSource
from heatlens._stream.calls import join, wait_done
from heatlens._wire.streams import check_frames

Item = TypeVar("Item")

_END: Any = object()


class BaseRun:
    """What runs of `Stream.map` and `AsyncStream.map` share.

    Attributes:
        stopped: whether the loop over `map` was left.
        done: whether no more frames are pulled.
        error: what the caller's iterable raised.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.done = False
        self.error: BaseException | None = None


class MapRun(BaseRun):
    """One run of `Stream.map`, and the thread that pulls for it.

    Raises:
        InvalidArgumentError: not an iterable of frames.
    """

    def __init__(self, frames: Iterable[ImageSource]) -> None:
        check_frames(frames, Iterable)
        super().__init__()
        self.frames = iter(frames)
        self._thread: threading.Thread | None = None

    def start(self, pump: Callable[[], None]) -> None:
        """Run the pump, which pulls the frames."""
        self._thread = threading.Thread(target=pump, name="heatlens-stream-pump", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait a moment for the pump: for a frame that is on its way, as the caller may release a camera next."""
        join(self._thread)


class AsyncMapRun(BaseRun):
    """One run of `AsyncStream.map`, and the task that pulls for it.

    Raises:
        InvalidArgumentError: not an iterable of frames.
    """

    def __init__(self, frames: Iterable[ImageSource] | AsyncIterable[ImageSource]) -> None:
        check_frames(frames, Iterable, AsyncIterable)
        super().__init__()
        self.frames: AsyncIterator[ImageSource] = (
            aiter(frames) if isinstance(frames, AsyncIterable) else Puller(iter(frames))
        )
        self._task: asyncio.Task[None] | None = None

    def start(self, pump: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the pump, which pulls the frames."""
        self._task = asyncio.create_task(pump(), name="heatlens-stream-pump")

    async def join(self) -> None:
        """Wait a moment for the pump, then cancel it.

        A frame on its way from a blocking iterable is waited for first: the caller may release a camera next.
        """
        task, frames = self._task, self.frames
        try:
            if task is not None and isinstance(frames, Puller):
                await wait_done(task)
        finally:
            if isinstance(frames, Puller):
                frames.close()
            if task is not None and not task.done():
                task.cancel()
        if task is not None:
            await wait_done(task)


class Puller(Generic[Item]):
    """An asynchronous iterator over a blocking one.

    Items are pulled one at a time, when asked for, all in one daemon thread. When that hangs in a camera's driver, it
    does not keep the event loop or the process from ending, as a thread of asyncio's pool would.
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
        """Let the thread end when the iterator returns. Idempotent."""
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
                # The event loop is closed: nothing waits for the item.
                return
            del future, item, error


def _hand_over(future: "asyncio.Future[Any]", item: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(item)
    else:
        future.set_exception(error)
