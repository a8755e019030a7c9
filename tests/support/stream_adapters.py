"""Clients and streams for threads with the methods of those for asyncio, so that one test serves both; and waiting."""

import asyncio
import contextlib

FRAMES = [bytes([i]) for i in range(40)]
NAN, INF = float("nan"), float("inf")

_END = object()


async def collected(answers, into=None):
    """All answers, in a new list or at the end of one."""
    items = [] if into is None else into
    async for item in answers:
        items.append(item)
    return items


async def settled(condition, timeout_s=5.0):
    """Wait until something is so; it may be another thread's doing."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(coroutine):
    """A task that is still running after a moment, and cancelled at the end if it is then."""
    task = asyncio.create_task(coroutine)
    done, _ = await asyncio.wait({task}, timeout=0.1)
    assert not done, "it should wait"
    try:
        yield task
    finally:
        task.cancel()


class SyncStreamAdapter:
    """Every call runs in a thread."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        value = getattr(type(self.stream), name, None)
        if isinstance(value, property) or name.startswith("_"):
            return getattr(self.stream, name)
        return lambda *args, **options: asyncio.to_thread(getattr(self.stream, name), *args, **options)

    async def __aenter__(self):
        await asyncio.to_thread(self.stream.__enter__)
        return self

    async def __aexit__(self, *exc):
        await asyncio.to_thread(self.stream.__exit__, *exc)

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await asyncio.to_thread(next, self.stream, _END)
        if item is _END:
            raise StopAsyncIteration
        return item

    def map(self, frames):
        return self._map(self.stream.map(frames))

    async def _map(self, answers):
        try:
            while (item := await asyncio.to_thread(next, answers, _END)) is not _END:
                yield item
        finally:
            answers.close()


class SyncClientAdapter:
    """A `Client` with the AsyncClient's methods: every call runs in a thread."""

    def __init__(self, client):
        self.client = client

    def __getattr__(self, name):
        return lambda *args, **kwargs: asyncio.to_thread(getattr(self.client, name), *args, **kwargs)

    def stream(self, **options):
        return SyncStreamAdapter(self.client.stream(**options))
