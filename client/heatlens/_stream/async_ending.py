"""How a grpc.aio call really ended."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

Value = TypeVar("Value")

# How grpc.aio names what it makes up when a message cannot be sent.
_MADE_UP = (grpc.StatusCode.INTERNAL, "Internal error from Core")


class Ending:
    """Remembers the status with which the server, or the connection, ended a call.

    When a write fails, grpc.aio replaces the call's status by one it makes up; and writes do fail when the server ends
    a stream that the client is still sending to. Which of the two statuses comes last is chance. But a call's done
    callbacks run at each, at once: there the other one can be seen.
    """

    def __init__(self, call: "grpc.aio.StreamStreamCall[Any, Any]") -> None:
        self._known = asyncio.Event()
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def of(self, failure: grpc.RpcError, *, patience_s: float) -> grpc.RpcError | None:
        """Return why the call really ended; None: it ended well.

        Args:
            failure: what reading from the call raised.
            patience_s: how long the true status may take to arrive if that is not it, in seconds.
        """
        if not isinstance(failure, grpc.aio.AioRpcError) or (failure.code(), failure.details()) != _MADE_UP:
            return failure
        try:
            async with asyncio.timeout(patience_s):
                await self._known.wait()
        except TimeoutError:
            return failure
        return None if self._status is None or self._status.code() is grpc.StatusCode.OK else self._status

    def _note(self, call: Any) -> None:  # noqa: ANN401 - grpc.aio's own call, whose type its stubs do not say here
        code, details = _at_once(call.code()), _at_once(call.details())
        if (code, details) != _MADE_UP:
            trailing = _at_once(call.trailing_metadata())
            self._status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
            self._known.set()


def _at_once(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: Value = done.value
        return value
    coroutine.close()
    raise RuntimeError("the call is done, and does not know how")
