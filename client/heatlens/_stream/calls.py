"""What streams for threads and streams for asyncio do differently: waiting, and running gRPC's call."""

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import grpc
import grpc.aio

from heatlens._exceptions import CallCancelledError, HeatlensError, InternalError
from heatlens._wire.status import error_of
from heatlens.v1.explain_pb2 import StreamExplainRequest, StreamExplainResponse

Value = TypeVar("Value")

# How long closing waits for threads or tasks: for the server to end the stream, and for a caller's iterable.
JOIN_TIMEOUT_S = 1.0
# How often a thread that waits looks for a Ctrl-C.
_POLL_S = 0.5
# The status that grpc.aio makes up when a message cannot be sent.
_MADE_UP = (grpc.StatusCode.INTERNAL, "Internal error from Core")

OnResponse: TypeAlias = Callable[[StreamExplainResponse, str], None]
OnEnd: TypeAlias = Callable[[HeatlensError | None], float | None]

# Reentrant: a generator of `map` may be collected in any thread.
Lock = threading.RLock


class Condition:
    """Lets threads wait until something is so. The lock must be held."""

    # Python closes a generator that is left at once.
    CLOSING_TIMEOUT_S: ClassVar[float] = 0.0

    def __init__(self, lock: threading.RLock) -> None:
        self._condition = threading.Condition(lock)

    def notify_all(self) -> None:
        """Wake the threads that wait."""
        self._condition.notify_all()

    def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:
        """Wait until the predicate is true; returns False if it is not within the timeout, in seconds."""
        deadline_s = math.inf if timeout is None else time.monotonic() + timeout
        # A Ctrl-C that comes just before a thread begins to wait is noticed when the wait ends: so it is a short one.
        while not self._condition.wait_for(predicate, max(0.0, min(_POLL_S, deadline_s - time.monotonic()))):
            if time.monotonic() >= deadline_s:
                return False
        return True


class AsyncLock(nullcontext[None]):
    """Locks nothing: between two awaits, no other task of the event loop runs."""


class AsyncCondition:
    """Lets tasks wait until something is so."""

    # asyncio closes a generator that is left a moment later.
    CLOSING_TIMEOUT_S: ClassVar[float] = JOIN_TIMEOUT_S

    def __init__(self, lock: AbstractContextManager[Any]) -> None:
        del lock
        self._changed = asyncio.Event()

    def notify_all(self) -> None:
        """Wake the tasks that wait now. Those that come later look for themselves before they wait."""
        self._changed.set()
        self._changed.clear()

    async def wait_for(self, predicate: Callable[[], object], timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Wait until the predicate is true; returns False if it is not within the timeout, in seconds."""
        if predicate():
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while not predicate():
                    await self._changed.wait()
        return bool(predicate())


def run(work: Callable[[], Value], *, blocks: bool) -> Value:  # noqa: ARG001 - a thread may block
    """Return what `work` returns."""
    return work()


async def async_run(work: Callable[[], Value], *, blocks: bool) -> Value:
    """Return what `work` returns. If it blocks, it runs in a thread, so that the event loop goes on."""
    return await asyncio.to_thread(work) if blocks else work()


class StreamCall(Protocol):
    """What is needed of gRPC's call object."""

    def __iter__(self) -> Iterator[StreamExplainResponse]: ...

    def cancel(self) -> object: ...


AsyncStreamCall: TypeAlias = "grpc.aio.StreamStreamCall[StreamExplainRequest, StreamExplainResponse]"
StartCall: TypeAlias = Callable[[Iterator[StreamExplainRequest]], tuple[StreamCall, str]]
AsyncStartCall: TypeAlias = Callable[[], tuple[AsyncStreamCall, str]]


class Call:
    """One call of StreamExplain, for threads: gRPC's own thread sends, the reader takes what the server sends.

    Args:
        start: makes the call; returns it and its request id.
        next_request: waits for the next message to send; None: no more follow. Told which call asks, from 0 on.
        on_response: told what the server sends, and the request id. Raises HeatlensError if that breaks the contract.
        on_end: told why the call ended (None: well); says in how many seconds another one follows, None: never.
    """

    def __init__(
        self,
        start: StartCall,
        *,
        next_request: Callable[[int], StreamExplainRequest | None],
        on_response: OnResponse,
        on_end: OnEnd,
    ) -> None:
        self._start = start
        self._next_request = next_request
        self._on_response = on_response
        self._on_end = on_end
        self._cancelled = threading.Event()
        self._call, self.request_id = start(self._requests(0))
        self._reader = threading.Thread(target=self._read, name="heatlens-stream-reader", daemon=True)
        self._reader.start()

    def cancel(self) -> None:
        """End the call, and let no other one follow. Idempotent."""
        self._cancelled.set()
        self._call.cancel()

    def join(self) -> None:
        """Wait for the reader, at most JOIN_TIMEOUT_S."""
        join(self._reader)

    def _requests(self, number: int) -> Iterator[StreamExplainRequest]:
        """Yield what is sent. When it returns, gRPC half-closes."""
        while (request := self._next_request(number)) is not None:
            yield request
            # Free its megabytes while this waits for the next.
            del request

    def _read(self) -> None:
        number = 0
        while (wait_s := self._read_one()) is not None and not self._cancelled.wait(wait_s):
            number += 1
            try:
                self._call, self.request_id = self._start(self._requests(number))
            except HeatlensError as error:
                # The client is closed.
                self._on_end(error)
                return
            if self._cancelled.is_set():
                # Meanwhile: that cancelled the call before.
                self._call.cancel()

    def _read_one(self) -> float | None:
        error: HeatlensError | None = InternalError("the stream's reader failed", request_id=self.request_id)
        try:
            for response in self._call:
                self._on_response(response, self.request_id)
            error = None
        except grpc.RpcError as failure:
            error = error_of(failure, self.request_id)
        except HeatlensError as failure:
            failure.request_id = self.request_id
            error = failure
            self._call.cancel()
        finally:
            wait_s = self._on_end(error)
        return wait_s


def join(thread: threading.Thread | None) -> None:
    """Wait for a thread, at most JOIN_TIMEOUT_S. One that never ran, or is the caller's own, needs no waiting."""
    if thread is not None and thread is not threading.current_thread():
        with suppress(RuntimeError):
            thread.join(JOIN_TIMEOUT_S)


class AsyncCall:
    """One call of StreamExplain, for asyncio: the writer sends, the reader takes what the server sends. As `Call`."""

    def __init__(
        self,
        start: AsyncStartCall,
        *,
        next_request: Callable[[int], Awaitable[StreamExplainRequest | None]],
        on_response: OnResponse,
        on_end: OnEnd,
    ) -> None:
        self._start = start
        self._next_request = next_request
        self._on_response = on_response
        self._on_end = on_end
        self._call, self.request_id = start()
        self._reader = asyncio.create_task(self._read(), name="heatlens-stream-reader")

    def cancel(self) -> None:
        """End the call, and let no other one follow. Idempotent."""
        self._call.cancel()
        self._reader.cancel()

    async def join(self) -> None:
        """Wait for the reader, at most JOIN_TIMEOUT_S."""
        await wait_done(self._reader)

    async def _write(self, number: int) -> None:
        try:
            while (request := await self._next_request(number)) is not None:
                await self._call.write(request)
                # Free its megabytes while this waits for the next.
                del request
            await self._call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The call is over: the reader learns why.
            pass
        except asyncio.CancelledError:
            if _cancelled():
                raise

    async def _read(self) -> None:
        number = 0
        while (wait_s := await self._read_one(number)) is not None:
            await asyncio.sleep(wait_s)
            number += 1
            try:
                self._call, self.request_id = self._start()
            except HeatlensError as error:
                # The client is closed.
                self._on_end(error)
                return

    async def _read_one(self, number: int) -> float | None:
        writer = asyncio.create_task(self._write(number), name="heatlens-stream-writer")
        status = CallStatus(self._call)
        error: HeatlensError | None = InternalError("the stream's reader failed", request_id=self.request_id)
        try:
            # Not call.read(): that forgets what has arrived when a write fails.
            async for response in self._call:
                self._on_response(response, self.request_id)
            error = None
        except grpc.RpcError as failure:
            true = await status.after(failure, timeout_s=JOIN_TIMEOUT_S)
            error = None if true is None else error_of(true, self.request_id)
        except HeatlensError as failure:
            failure.request_id = self.request_id
            error = failure
            self._call.cancel()
        except asyncio.CancelledError:
            error = CallCancelledError("the client was closed during the call", request_id=self.request_id)
            if _cancelled():
                raise
        finally:
            # While a call waits for its connection, a write does not notice that the call has ended.
            writer.cancel()
            wait_s = self._on_end(error)
        return wait_s


def _cancelled() -> bool:
    """Return whether the running task was cancelled; if not, the call that it waits for was."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def wait_done(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for tasks, at most JOIN_TIMEOUT_S."""
    if tasks:
        await asyncio.wait(tasks, timeout=JOIN_TIMEOUT_S)


class CallStatus:
    """Remembers the status with which the server, or the connection, ended a call.

    A write fails when the server ends a stream to which the client is still sending. grpc.aio then replaces the call's
    status by one that it makes up. Either status may come last, but the call's done callbacks run for both: a callback
    sees the true one.
    """

    def __init__(self, call: "grpc.aio.StreamStreamCall[Any, Any]") -> None:
        self._known = asyncio.Event()
        self._status: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    async def after(self, failure: grpc.RpcError, *, timeout_s: float) -> grpc.RpcError | None:
        """Return why the call really ended; None: it ended well.

        Args:
            failure: what reading from the call raised.
            timeout_s: how long to wait for the true status, in seconds, if `failure` is made up.
        """
        if not isinstance(failure, grpc.aio.AioRpcError) or (failure.code(), failure.details()) != _MADE_UP:
            return failure
        try:
            async with asyncio.timeout(timeout_s):
                await self._known.wait()
        except TimeoutError:
            return failure
        return None if self._status is None or self._status.code() is grpc.StatusCode.OK else self._status

    def _note(self, call: Any) -> None:  # noqa: ANN401 - grpc.aio's own call, whose type its stubs do not say here
        code, details = _result_of(call.code()), _result_of(call.details())
        if (code, details) != _MADE_UP:
            trailing = _result_of(call.trailing_metadata())
            self._status = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)
            self._known.set()


def _result_of(coroutine: Coroutine[Any, Any, Value]) -> Value:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: Value = done.value
        return value
    coroutine.close()
    raise RuntimeError("the call is done, but has no status yet")
