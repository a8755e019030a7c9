"""The call under an `AsyncStream`: opens it, sends what the window lets out, and takes the answers.

Two tasks serve a link besides its callers: the writer sends, the reader takes answers. All of them live on one event
loop and change the window between awaits, so nothing needs a lock; one event tells all of them of every change.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from heatlens._exceptions import CallCancelledError, HeatlensError, InternalError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult
from heatlens._stream.link import JOIN_TIMEOUT_S, BaseLink
from heatlens._wire.status import error_of
from heatlens._wire.streams import StreamPlan, config_request, frame_request, takes_time
from heatlens.v1 import explain_pb2

Value = TypeVar("Value")

AsyncStreamCall: TypeAlias = (
    "grpc.aio.StreamStreamCall[explain_pb2.StreamExplainRequest, explain_pb2.StreamExplainResponse]"
)
AsyncStartCall: TypeAlias = Callable[[], tuple[AsyncStreamCall, str]]

# How grpc.aio names what it makes up when a message cannot be sent.
_MADE_UP = (grpc.StatusCode.INTERNAL, "Internal error from Core")


class AsyncLink(BaseLink):
    """One call of StreamExplain, for asyncio.

    Args:
        start: makes the call; returns it and its request id.
        plan: what the stream was asked for.
        timeout_s: how long the server may take to start the stream; None: for ever.
    """

    def __init__(self, start: AsyncStartCall, plan: StreamPlan, *, timeout_s: float | None) -> None:
        # Between two awaits, no other task runs: there is nothing to lock.
        super().__init__(plan, timeout_s=timeout_s, lock=nullcontext())
        self._changed = asyncio.Event()
        self._start = start
        self._call: AsyncStreamCall | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def tell(self, *, everybody: bool = False) -> None:  # noqa: ARG002 - all are woken in any case
        """Tell everybody of a change."""
        # Tasks that wait now wake up; those that come later look for themselves before they wait.
        self._changed.set()
        self._changed.clear()

    async def _until(self, ready: Callable[[], object]) -> None:
        """Wait until something is so."""
        while not ready():
            await self._changed.wait()

    async def open(self) -> None:
        """Wait until the server has started the stream. Raises what `Link.open` raises."""
        self._check_open()
        if self._call is None:
            call, self._request_id = self._start()
            self._call = call
            reader = asyncio.create_task(self._read(call), name="heatlens-stream-reader")
            writer = asyncio.create_task(self._write(call), name="heatlens-stream-writer")
            # While a call waits for its connection, a write does not notice that the call has ended.
            reader.add_done_callback(lambda _: writer.cancel())
            self._tasks = [reader, writer]
        if self.started is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._until(lambda: self.started is not None or self.window.ended)
            except TimeoutError:
                self._end_unstarted()
                self._cancel()
        if self.started is None:
            self.window.raise_if_broken()

    async def wait_to_pull(self, over: Callable[[], bool]) -> int | None:
        """Wait until `map` may pull a frame; returns its id, or None when `map` is over."""
        await self._until(lambda: self.window.may_pull or over())
        return None if over() else self.window.checked_id(None)

    async def wait_free(self, free: Callable[[], bool]) -> None:
        """Wait for a `map` whose loop was left: asyncio closes its generator a moment later."""
        with suppress(TimeoutError):
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                await self._until(free)

    async def put(
        self,
        frame: ImageSource,
        frame_id: int,
        *,
        captured: Timestamp | None,
        accepted_s: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Send a frame as soon as there is room. As `Link.put`; files are read and JPEGs encoded in a thread."""
        window = self.window

        def too_late() -> bool:
            return window.ended or window.finishing or stopped()

        while True:
            left_out = window.leaves_out

            def build(left_out: bool = left_out) -> explain_pb2.StreamExplainRequest:
                return frame_request(self._plan, frame, frame_id, captured=captured, left_out=left_out)

            slow = takes_time(self._plan, frame, left_out=left_out)
            request = await asyncio.to_thread(build) if slow else build()
            await self._until(lambda: window.room or too_late())
            if too_late():
                return False
            # Otherwise a frame held back was sent meanwhile, and this one has become the next.
            if window.leaves_out == left_out:
                window.put(frame_id, frame, request, accepted_s=accepted_s, now_s=time.monotonic())
                self.tell()
                return True

    async def take(self, complete: Callable[[], bool] = lambda: False) -> FrameResult | None:
        """Wait for the next answer. As `Link.take`."""
        await self._until(lambda: self.window.answered or self.window.ended or complete())
        if not self.window.answered:
            if not complete():
                self.window.raise_if_broken()
            return None
        item = self.window.take()
        self.tell()
        return item

    async def shut(self, *, politely: bool) -> None:
        """Close. Politely: if nothing is unanswered, the server may end the stream itself. Idempotent."""
        self.closed = True
        try:
            if politely and self.started is not None and self.window.idle:
                self.window.finish()
                self.tell()
                await wait_done(*self._tasks)
        finally:
            self._end_closed()
            self._cancel()
        await wait_done(*self._tasks)

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()

    async def _write(self, call: AsyncStreamCall) -> None:
        """Send what the window lets out, then half-close. The writer."""
        window = self.window
        try:
            await call.write(config_request(self._plan))
            while True:
                await self._until(lambda: window.outgoing or window.ended or window.half_closed)
                if not window.outgoing:
                    break
                await call.write(window.outgoing.popleft())
            if not window.ended:
                await call.done_writing()
        except (grpc.RpcError, asyncio.InvalidStateError):
            # The call is over: the reader learns why.
            pass
        except asyncio.CancelledError:
            if _cancelled():
                raise

    async def _read(self, call: AsyncStreamCall) -> None:
        """Take the server's answers until the end. The reader."""
        ending = Ending(call)
        error: HeatlensError | None = InternalError("the stream's reader failed", request_id=self._request_id)
        try:
            # Not call.read(): that forgets what has arrived when a write fails.
            async for response in call:
                self._handle(response)
            error = None
        except grpc.RpcError as failure:
            true = await ending.of(failure, timeout_s=JOIN_TIMEOUT_S)
            error = None if true is None else error_of(true, self._request_id)
        except HeatlensError as failure:
            failure.request_id = self._request_id
            error = failure
            call.cancel()
        except asyncio.CancelledError:
            error = CallCancelledError("the client was closed during the call", request_id=self._request_id)
            if _cancelled():
                raise
        finally:
            self._end(error)


def _cancelled() -> bool:
    """Whether the running task was cancelled. Otherwise it was the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def wait_done(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for tasks, at most JOIN_TIMEOUT_S."""
    if tasks:
        await asyncio.wait(tasks, timeout=JOIN_TIMEOUT_S)


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

    async def of(self, failure: grpc.RpcError, *, timeout_s: float) -> grpc.RpcError | None:
        """Return why the call really ended; None: it ended well.

        Args:
            failure: what reading from the call raised.
            timeout_s: how long the true status may take to arrive if that is not it, in seconds.
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
