"""A `Stream` with the face of an AsyncStream, so that one test serves both: every call runs in a thread."""

import asyncio

_END = object()


class SyncStreamFace:
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
