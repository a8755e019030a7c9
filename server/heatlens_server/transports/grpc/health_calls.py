"""Calls of grpc.health.v1, which anybody may make: their messages and their number are bounded, and none is waited for.

The health service of gRPC writes to its watchers one after the other, under a lock: a watcher that does not read would
keep all others, and a server that shuts down, waiting.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from heatlens_server.api.admission import MAX_NAME_BYTES, Admission
from heatlens_server.core.errors import HeatlensError, InvalidArgument
from heatlens_server.transports.grpc.parsing import parsed, tolerant
from heatlens_server.transports.grpc.traffic import OpenCall, Traffic

HEALTH_PREFIX = "/grpc.health.v1.Health/"

_MOST_WATCHERS = 1024

Context = Any  # grpc.aio.ServicerContext, whose type parameters differ per method


class HealthCalls:
    """Wraps the handlers of the health service."""

    def __init__(self, admission: Admission, traffic: Traffic) -> None:
        """Read messages within the public budget of `admission`, and tell `traffic` of calls."""
        self._admission = admission
        self._traffic = traffic
        self._watchers = 0

    def handler(self, handler: Any) -> Any:  # noqa: ANN401 - grpc's handler type
        """The wrapped handler of a method with one request."""
        if handler.unary_unary is not None:

            async def check(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
                with self._traffic.call(context.peer(), is_check=True, remaining=context.time_remaining) as came:
                    request = await self._request(handler, context, came)
                    await context.write(await handler.unary_unary(request, context))

            return grpc.stream_stream_rpc_method_handler(check, None, handler.response_serializer)

        async def watch(requests: object, context: Context) -> None:  # noqa: ARG001 - read through the context
            if self._watchers >= _MOST_WATCHERS:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MOST_WATCHERS} watch already")
            self._watchers += 1
            try:
                with self._traffic.call(context.peer(), is_check=True, remaining=context.time_remaining) as came:
                    request = await self._request(handler, context, came)
                    latest = _Latest()
                    watching = asyncio.create_task(handler.unary_stream(request, latest))
                    try:
                        await latest.pass_on(context.write)
                    finally:
                        watching.cancel()
                        with contextlib.suppress(asyncio.CancelledError):
                            await watching
            finally:
                self._watchers -= 1

        return grpc.stream_stream_rpc_method_handler(watch, None, handler.response_serializer)

    async def _request(self, handler: Any, context: Context, came: OpenCall) -> Any:  # noqa: ANN401 - any message
        admission = self._admission
        try:
            with await admission.public.await_message(context.peer(), admission.max_message_bytes) as held:
                came.awaits = True
                data = await admission.receive(held, context.read())
            came.read(0 if data is grpc.aio.EOF else len(data))
            if data is not grpc.aio.EOF and len(data) > MAX_NAME_BYTES:
                del data  # the error's traceback would keep it
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, f"the message has more than {MAX_NAME_BYTES} bytes"
                )
            if data is not grpc.aio.EOF:
                return parsed(tolerant(handler.request_deserializer)(data))
        except InvalidArgument as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message)
        except HeatlensError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, error.message)
        return await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")


class _Latest:
    """A context whose writes never wait: what its peer has not taken yet gives way to what is newer."""

    def __init__(self) -> None:
        self._message: object = None
        self._news = asyncio.Event()

    async def write(self, message: object) -> None:
        """Send a message when the one before is taken, unless a newer one comes."""
        self._message = message
        self._news.set()

    async def pass_on(self, write: Callable[[object], Awaitable[None]]) -> None:
        """Send what is written, until it is cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            await write(self._message)
