"""One call of StreamExplain under an `AsyncStream`: opens it, sends what the window lets out, takes the answers."""

import math
import time
from collections.abc import Callable
from functools import partial

from google.protobuf.timestamp_pb2 import Timestamp

from heatlens._exceptions import CallCancelledError, DeadlineExceededError, HeatlensError, UnavailableError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult
from heatlens._stream.calls import AsyncCall, AsyncCondition, AsyncLock, AsyncStartCall, async_run
from heatlens._stream.window import Window, state_error
from heatlens._wire.streams import Started, StreamPlan, answer_of, config_request, frame_request, takes_time
from heatlens.v1.explain_pb2 import StreamExplainRequest, StreamExplainResponse

# Between a break and the calls that try to go on, in seconds, unless the server says how long.
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 2.0

_STREAM_LIMIT = "STREAM_LIMIT"


class AsyncLink:
    """A stream's window, and the call that it belongs to.

    Each kind of waiting has its own condition: with a single one, each frame woke twice as many threads as needed.

    Args:
        start: makes the call; returns it and its request id.
        plan: what the stream was asked for.
        timeout_s: how long the server may take to start the stream; None: for ever.

    Attributes:
        window: the frames. Only touched while `lock` is held.
        lock: guards the window where threads share it.
        started: what the server said when it started the stream; None before.
        closed: whether `close` was called.
    """

    def __init__(self, start: AsyncStartCall, plan: StreamPlan, *, timeout_s: float | None) -> None:
        self.window: Window[StreamExplainRequest] = Window(
            drop_oldest=plan.drop_oldest, every=plan.every, keeps_sent=plan.resume
        )
        self.window.outgoing.append(config_request(plan))
        self.lock = AsyncLock()
        self.started: Started | None = None
        self.closed = False
        self._answered = AsyncCondition(self.lock)
        self._outgoing = AsyncCondition(self.lock)
        self._can_put = AsyncCondition(self.lock)
        self._pulling = AsyncCondition(self.lock)
        self._start = start
        self._plan = plan
        self._timeout_s = timeout_s
        self._call: AsyncCall | None = None
        # The call that is current, how many failed since the last answer, and until when others may follow.
        self._number = 0
        self._failures = 0
        self._resume_until_s = math.inf

    def notify(self, *, all_waiting: bool = False) -> None:
        """Wake what waits for a change of the window, after one; or all that waits. `lock` must be held."""
        window = self.window
        all_waiting = all_waiting or window.ended
        for condition, met in (
            (self._answered, window.answered),
            (self._outgoing, window.outgoing or window.half_closed),
            (self._can_put, window.can_put),
            (self._pulling, window.may_pull),
        ):
            if all_waiting or met:
                condition.notify_all()

    async def open(self) -> None:
        """Wait until the server has started the stream. The first caller makes the call.

        Raises:
            FailedPreconditionError: the stream is closed, or the client.
            DeadlineExceededError: the server took too long.
            HeatlensError: the server refused the stream. What breaks it later is not raised here.
        """
        with self.lock:
            if self.closed:
                raise state_error("STREAM_CLOSED", "the stream is closed")
            if self._call is None:
                self._call = AsyncCall(
                    self._start, next_request=self._next_request, on_response=self._handle, on_end=self._end
                )
            if not await self._answered.wait_for(
                lambda: self.started is not None or self.window.ended, self._timeout_s
            ):
                message = f"the server did not start the stream within {self._timeout_s} s"
                self._end(DeadlineExceededError(message, request_id=self._call.request_id))
                self._call.cancel()
            if self.started is None:
                self.window.raise_if_broken()

    async def wait_to_pull(self, over: Callable[[], bool]) -> int | None:
        """Wait until `map` may pull a frame; returns its id, or None when `map` is over."""
        with self.lock:
            await self._pulling.wait_for(lambda: self.window.may_pull or over())
            return None if over() else self.window.checked_id(None)

    async def wait_free(self, free: Callable[[], bool]) -> None:
        """Wait a moment until the generator of a `map` whose loop was left is closed."""
        with self.lock:
            await self._pulling.wait_for(free, AsyncCondition.CLOSING_TIMEOUT_S)

    async def put(
        self,
        frame: ImageSource,
        frame_id: int,
        *,
        captured: Timestamp | None,
        accepted_s: float,
        stopped: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Send a frame as soon as there is room.

        Args:
            frame: the frame.
            frame_id: its id, checked.
            captured: when it was captured.
            accepted_s: when the caller passed it, on the monotonic clock, in seconds.
            stopped: whether it need not be sent any more.

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
            skipped = window.next_is_skipped
            build = partial(frame_request, self._plan, frame, frame_id, captured=captured, skipped=skipped)
            request = await async_run(build, blocks=takes_time(self._plan, frame, skipped=skipped))
            with self.lock:
                await self._can_put.wait_for(lambda: window.can_put or too_late())
                if too_late():
                    return False
                # If it changed, a frame held back was sent meanwhile: build the request again.
                if window.next_is_skipped == skipped:
                    window.put(frame_id, frame, request, accepted_s=accepted_s, now_s=time.monotonic())
                    self.notify()
                    return True

    async def take(self, complete: Callable[[], bool] = lambda: False) -> FrameResult | None:
        """Wait for the next answer.

        Args:
            complete: whether no answer will follow, although the stream goes on.

        Returns:
            None: no answer will follow.

        Raises:
            HeatlensError: the stream broke; answers that came before are returned first.
        """
        with self.lock:
            await self._answered.wait_for(lambda: self.window.answered or self.window.ended or complete())
            if not self.window.answered:
                if not complete():
                    self.window.raise_if_broken()
                return None
            item = self.window.take()
            self.notify()
            return item

    async def close(self, *, gracefully: bool) -> None:
        """Close. Politely: if nothing is unanswered, the server may end the stream itself. Idempotent."""
        with self.lock:
            self.closed = True
            call = self._call
            graceful = gracefully and self.started is not None and self.window.idle
            if graceful:
                self.window.finish()
                self.notify(all_waiting=True)
        try:
            if call is not None and graceful:
                await call.join()
        finally:
            request_id = "" if call is None else call.request_id
            # In one: who sends must not see the end before the call is cancelled, and half-close it.
            with self.lock:
                self._end(CallCancelledError("the stream was closed", reason="STREAM_CLOSED", request_id=request_id))
                if call is not None:
                    call.cancel()
        if call is not None:
            await call.join()

    async def _next_request(self, number: int) -> StreamExplainRequest | None:
        """Wait for the next message that a call sends; None: no more follow."""
        window = self.window
        with self.lock:
            await self._outgoing.wait_for(
                lambda: window.outgoing or window.ended or window.half_closed or number != self._number
            )
            return window.outgoing.popleft() if window.outgoing and number == self._number else None

    def _handle(self, response: StreamExplainResponse, request_id: str) -> None:
        """Tell the window what the server sent.

        Raises:
            InternalError: it breaks the contract.
            UnavailableError: the server cannot explain a frame that another one may.
        """
        answer = answer_of(response, self._plan, request_id)
        with self.lock:
            if self.window.ended:
                return
            if isinstance(answer, Started):
                self.window.start(answer.window)
                self.started = answer
            elif self._plan.resume and isinstance(answer.error, UnavailableError):
                raise answer.error
            else:
                self._failures = 0
                self.window.answer(
                    answer.frame_id,
                    now_s=time.monotonic(),
                    result=answer.result,
                    error=answer.error,
                    skipped=answer.skipped,
                )
            self.notify(all_waiting=isinstance(answer, Started))

    def _end(self, error: HeatlensError | None) -> float | None:
        """End the window (None: the server says that everything is answered), or say when another call goes on."""
        with self.lock:
            wait_s = self._wait_to_resume(error)
            if wait_s is None:
                self.window.end(error)
            else:
                self._number += 1
                self.window.resume(config_request(self._plan), now_s=time.monotonic())
            self.notify(all_waiting=True)
        return wait_s

    def _wait_to_resume(self, error: HeatlensError | None) -> float | None:
        """In how many seconds another call goes on where this one broke; None: none does."""
        breaks = isinstance(error, UnavailableError) or (error is not None and error.reason == _STREAM_LIMIT)
        if not self._plan.resume or not breaks or self.started is None or self.window.ended or self.closed:
            return None
        now_s = time.monotonic()
        if not self._failures:
            self._resume_until_s = math.inf if self._timeout_s is None else now_s + self._timeout_s
        wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**self._failures)
        if error is not None and error.retry_after_s is not None:
            wait_s = error.retry_after_s
        self._failures += 1
        return wait_s if now_s + wait_s < self._resume_until_s else None
