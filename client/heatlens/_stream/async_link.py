"""The call under an `AsyncStream`: opens it, sends what the window lets out, and takes the answers.

Two tasks serve a link besides its callers: the writer sends, the reader takes answers. All of them live on one event
loop and change the window between awaits, so nothing needs a lock; one event tells all of them of every change.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from heatlens._exceptions import CallCancelledError, DeadlineExceededError, HeatlensError, InternalError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult
from heatlens._stream.async_ending import Ending
from heatlens._stream.link import PATIENCE_S, never
from heatlens._stream.window import Window, wrong_moment
from heatlens._wire.status import error_of
from heatlens._wire.streams import Started, StreamPlan, answer_of, config_request, frame_request, takes_time
from heatlens.v1 import explain_pb2

AsyncStreamCall: TypeAlias = (
    "grpc.aio.StreamStreamCall[explain_pb2.StreamExplainRequest, explain_pb2.StreamExplainResponse]"
)
AsyncStartCall: TypeAlias = Callable[[], tuple[AsyncStreamCall, str]]


class AsyncLink:
    """One call of StreamExplain.

    Args:
        start: makes the call; returns it and its request id.
        plan: what the stream was asked for.
        timeout_s: how long the server may take to start the stream; None: for ever.

    Attributes:
        window: the frames.
        started: the server's leave to send; None before.
        closed: whether `shut` was called.
    """

    def __init__(self, start: AsyncStartCall, plan: StreamPlan, *, timeout_s: float | None) -> None:
        self.window: Window[explain_pb2.StreamExplainRequest] = Window(drop_oldest=plan.drop_oldest, every=plan.every)
        self.started: Started | None = None
        self.closed = False
        self._changed = asyncio.Event()
        self._start = start
        self._plan = plan
        self._timeout_s = timeout_s
        self._call: AsyncStreamCall | None = None
        self._request_id = ""
        self._tasks: list[asyncio.Task[None]] = []

    def notify(self) -> None:
        """Tell everybody of a change."""
        # Whoever waits now wakes up; whoever comes later looks for himself before he waits.
        self._changed.set()
        self._changed.clear()

    async def until(self, ready: Callable[[], object]) -> None:
        """Wait until something is so."""
        while not ready():
            await self._changed.wait()

    async def open(self) -> None:
        """Wait until the server has started the stream. The first to come makes the call.

        Raises:
            FailedPreconditionError: the stream is closed, or the client.
            DeadlineExceededError: the server took too long.
            HeatlensError: the server refused the stream. What breaks it later is not raised here.
        """
        if self.closed:
            raise wrong_moment("STREAM_CLOSED", "the stream is closed")
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
                    await self.until(lambda: self.started is not None or self.window.ended)
            except TimeoutError:
                message = f"the server did not start the stream within {self._timeout_s} s"
                self._end(DeadlineExceededError(message, request_id=self._request_id))
                self._cancel()
        if self.started is None:
            self.window.raise_if_broken()

    async def put(
        self,
        frame: ImageSource,
        frame_id: int,
        *,
        captured: Timestamp | None,
        accepted_s: float,
        stopped: Callable[[], bool] = never,
    ) -> bool:
        """Send a frame as soon as there is room.

        Args:
            frame: the frame.
            frame_id: its id, checked.
            captured: when it was captured.
            accepted_s: when the caller passed it, on the monotonic clock, in seconds.
            stopped: whether nobody wants it sent any more.

        Returns:
            False: it was not sent, as the stream ended, or is finished, or `stopped`.

        Raises:
            InvalidArgumentError: the frame is no image source, or larger than a message may be.
            FileNotFoundError: there is no such file (another OSError if it cannot be read).
        """
        window = self.window

        def too_late() -> bool:
            return window.ended or window.finishing or stopped()

        while True:
            left_out = window.leaves_out

            def build(left_out: bool = left_out) -> explain_pb2.StreamExplainRequest:
                return frame_request(self._plan, frame, frame_id, captured=captured, left_out=left_out)

            slow = takes_time(self._plan, frame, left_out=left_out)
            request = await asyncio.to_thread(build) if slow else build()
            await self.until(lambda: window.room or too_late())
            if too_late():
                return False
            # Otherwise a frame held back was sent meanwhile, and this one has become the next.
            if window.leaves_out == left_out:
                window.put(frame_id, frame, request, accepted_s=accepted_s, now_s=time.monotonic())
                self.notify()
                return True

    async def take(self, complete: Callable[[], bool] = never) -> FrameResult | None:
        """Wait for the next answer.

        Args:
            complete: whether no answer will follow, although the stream goes on.

        Returns:
            None: no answer will follow.

        Raises:
            HeatlensError: the stream broke; answers that came before are returned first.
        """
        await self.until(lambda: self.window.answered or self.window.ended or complete())
        if not self.window.answered:
            if not complete():
                self.window.raise_if_broken()
            return None
        item = self.window.take()
        self.notify()
        return item

    async def shut(self, *, politely: bool) -> None:
        """Close. Politely: if nothing is unanswered, the server may end the stream itself. Idempotent."""
        self.closed = True
        try:
            if politely and self.started is not None and self.window.idle:
                self.window.finish()
                self.notify()
                await gone(*self._tasks)
        finally:
            self._end(CallCancelledError("the stream was closed", reason="STREAM_CLOSED", request_id=self._request_id))
            self._cancel()
        await gone(*self._tasks)

    def _cancel(self) -> None:
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()

    def _end(self, error: HeatlensError | None) -> None:
        self.window.end(error)
        self.notify()

    async def _write(self, call: AsyncStreamCall) -> None:
        """Send what the window lets out, then half-close. The writer."""
        window = self.window
        try:
            await call.write(config_request(self._plan))
            while True:
                await self.until(lambda: window.outgoing or window.ended or window.half_closed)
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
                self._take_in(response, call)
            error = None
        except grpc.RpcError as failure:
            true = await ending.of(failure, patience_s=PATIENCE_S)
            error = None if true is None else error_of(true, self._request_id)
        except asyncio.CancelledError:
            error = CallCancelledError("the client was closed during the call", request_id=self._request_id)
            if _cancelled():
                raise
        finally:
            self._end(error)

    def _take_in(self, response: explain_pb2.StreamExplainResponse, call: AsyncStreamCall) -> None:
        if self.window.ended:
            return
        try:
            answer = answer_of(response, self._plan, self._request_id)
            if isinstance(answer, Started):
                self.window.start(answer.window)
                self.started = answer
            else:
                self.window.answer(
                    answer.frame_id,
                    now_s=time.monotonic(),
                    result=answer.result,
                    error=answer.error,
                    skipped=answer.skipped,
                )
        except HeatlensError as failure:
            failure.request_id = self._request_id
            self._end(failure)
            call.cancel()
        self.notify()


def _cancelled() -> bool:
    """Whether the running task was cancelled. Otherwise it was the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def gone(*tasks: "asyncio.Task[Any]") -> None:
    """Wait for tasks, not for ever."""
    if tasks:
        await asyncio.wait(tasks, timeout=PATIENCE_S)
