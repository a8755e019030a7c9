"""The call under a `Stream`, for threads: opens it, sends what the window lets out, and takes the answers.

Two threads serve a link besides its callers: gRPC's own takes messages from the window and sends them, the reader takes
answers. All share one lock; each kind of waiting has its own condition: with one for all, each frame woke twice as many
threads as had something to do.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from heatlens._exceptions import CallCancelledError, DeadlineExceededError, HeatlensError, InternalError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult
from heatlens._stream.window import Window, wrong_moment
from heatlens._wire.status import error_of
from heatlens._wire.streams import Started, StreamPlan, answer_of, config_request, frame_request
from heatlens.v1 import explain_pb2

# How often a thread that waits for a server to start a stream looks for a Ctrl-C.
_POLL_S = 0.5
# How long closing waits for threads or tasks: for the server to end the stream, and for a caller's iterable.
JOIN_TIMEOUT_S = 1.0


class StreamCall(Protocol):
    """What is needed of gRPC's call object."""

    def __iter__(self) -> Iterator[explain_pb2.StreamExplainResponse]: ...

    def cancel(self) -> object: ...


StartCall: TypeAlias = Callable[[Iterator[explain_pb2.StreamExplainRequest]], tuple[StreamCall, str]]


class BaseLink:
    """What the links for threads and for asyncio share: the state of one call of StreamExplain.

    Args:
        plan: what the stream was asked for.
        timeout_s: how long the server may take to start the stream; None: for ever.
        lock: what guards the window.

    Attributes:
        window: the frames. Only touched while `lock` is held.
        lock: what guards the window.
        started: the server's leave to send; None before.
        closed: whether `shut` was called.
    """

    def __init__(self, plan: StreamPlan, *, timeout_s: float | None, lock: AbstractContextManager[Any]) -> None:
        self.window: Window[explain_pb2.StreamExplainRequest] = Window(drop_oldest=plan.drop_oldest, every=plan.every)
        self.lock = lock
        self.started: Started | None = None
        self.closed = False
        self._plan = plan
        self._timeout_s = timeout_s
        self._request_id = ""

    def tell(self, *, everybody: bool = False) -> None:
        """After a change of the window, wake what waits for it. `lock` must be held."""
        raise NotImplementedError

    def _check_open(self) -> None:
        if self.closed:
            raise wrong_moment("STREAM_CLOSED", "the stream is closed")

    def _end(self, error: HeatlensError | None) -> None:
        """End the window; None: the server says that everything is answered."""
        with self.lock:
            self.window.end(error)
            self.tell()

    def _end_unstarted(self) -> None:
        """End the window because the server took too long to start the stream."""
        message = f"the server did not start the stream within {self._timeout_s} s"
        self._end(DeadlineExceededError(message, request_id=self._request_id))

    def _end_closed(self) -> None:
        """End the window because the caller closed the stream."""
        self._end(CallCancelledError("the stream was closed", reason="STREAM_CLOSED", request_id=self._request_id))

    def _handle(self, response: explain_pb2.StreamExplainResponse) -> None:
        """Tell the window what the server sent.

        Raises:
            InternalError: it breaks the contract.
        """
        answer = answer_of(response, self._plan, self._request_id)
        with self.lock:
            if self.window.ended:
                return
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
            self.tell(everybody=isinstance(answer, Started))


class Link(BaseLink):
    """One call of StreamExplain, for threads.

    Args:
        start: makes the call; returns it and its request id.
        plan: what the stream was asked for.
        timeout_s: how long the server may take to start the stream; None: for ever.
    """

    def __init__(self, start: StartCall, plan: StreamPlan, *, timeout_s: float | None) -> None:
        # Reentrant: a generator of `map` may be collected in any thread.
        lock = threading.RLock()
        super().__init__(plan, timeout_s=timeout_s, lock=lock)
        self._answered = threading.Condition(lock)
        self._outgoing = threading.Condition(lock)
        self._room = threading.Condition(lock)
        self._pulling = threading.Condition(lock)
        self._start = start
        self._call: StreamCall | None = None
        self._reader: threading.Thread | None = None

    def tell(self, *, everybody: bool = False) -> None:
        """After a change of the window, wake the threads that can go on; or all. `lock` must be held."""
        window = self.window
        everybody = everybody or window.ended
        for condition, met in (
            (self._answered, window.answered),
            (self._outgoing, window.outgoing or window.half_closed),
            (self._room, window.room),
            (self._pulling, window.may_pull),
        ):
            if everybody or met:
                condition.notify_all()

    def open(self) -> None:
        """Wait until the server has started the stream. The first caller makes the call.

        Raises:
            FailedPreconditionError: the stream is closed, or the client.
            DeadlineExceededError: the server took too long.
            HeatlensError: the server refused the stream. What breaks it later is not raised here.
        """
        with self.lock:
            self._check_open()
            if self._call is None:
                self._call, self._request_id = self._start(self._requests())
                self._reader = threading.Thread(
                    target=self._read, args=(self._call,), name="heatlens-stream-reader", daemon=True
                )
                self._reader.start()
            self._wait_started()
            if self.started is None:
                self._end_unstarted()
                self._call.cancel()
                self.window.raise_if_broken()

    def _wait_started(self) -> None:
        """Wait until the stream has started or ended, within the timeout. Holds the lock."""
        deadline_s = math.inf if self._timeout_s is None else time.monotonic() + self._timeout_s
        # A Ctrl-C that comes just before a thread begins to wait is noticed when the wait ends: so it is a short one.
        while not self._answered.wait_for(
            lambda: self.started is not None or self.window.ended,
            max(0.0, min(_POLL_S, deadline_s - time.monotonic())),
        ):
            if time.monotonic() >= deadline_s:
                return

    def wait_to_pull(self, over: Callable[[], bool]) -> int | None:
        """Wait until `map` may pull a frame; returns its id, or None when `map` is over."""
        with self.lock:
            self._pulling.wait_for(lambda: self.window.may_pull or over())
            return None if over() else self.window.checked_id(None)

    def wait_free(self, free: Callable[[], bool]) -> None:
        """Wait for a `map` whose loop was left: not here, as Python closes its generator at once."""

    def put(
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
            left_out = window.leaves_out
            request = frame_request(self._plan, frame, frame_id, captured=captured, left_out=left_out)
            with self.lock:
                self._room.wait_for(lambda: window.room or too_late())
                if too_late():
                    return False
                # Otherwise a frame held back was sent meanwhile, and this one has become the next.
                if window.leaves_out == left_out:
                    window.put(frame_id, frame, request, accepted_s=accepted_s, now_s=time.monotonic())
                    self.tell()
                    return True

    def take(self, complete: Callable[[], bool] = lambda: False) -> FrameResult | None:
        """Wait for the next answer.

        Args:
            complete: whether no answer will follow, although the stream goes on.

        Returns:
            None: no answer will follow.

        Raises:
            HeatlensError: the stream broke; answers that came before are returned first.
        """
        with self.lock:
            self._answered.wait_for(lambda: self.window.answered or self.window.ended or complete())
            if not self.window.answered:
                if not complete():
                    self.window.raise_if_broken()
                return None
            item = self.window.take()
            self.tell()
            return item

    def shut(self, *, politely: bool) -> None:
        """Close. Politely: if nothing is unanswered, the server may end the stream itself. Idempotent."""
        with self.lock:
            self.closed = True
            polite = politely and self.started is not None and self.window.idle
            if polite:
                self.window.finish()
                self.tell(everybody=True)
        if polite:
            join(self._reader)
        self._end_closed()
        if self._call is not None:
            self._call.cancel()
        join(self._reader)

    def _requests(self) -> Iterator[explain_pb2.StreamExplainRequest]:
        """Yield what is sent. Runs in gRPC's thread; when it returns, gRPC half-closes."""
        yield config_request(self._plan)
        window = self.window
        while True:
            with self.lock:
                self._outgoing.wait_for(lambda: window.outgoing or window.ended or window.half_closed)
                if not window.outgoing:
                    return
                request = window.outgoing.popleft()
            yield request
            # Free its megabytes while this waits for the next.
            del request

    def _read(self, call: StreamCall) -> None:
        """Take the server's answers until the end. Runs in the reader."""
        error: HeatlensError | None = InternalError("the stream's reader failed", request_id=self._request_id)
        try:
            for response in call:
                self._handle(response)
            error = None
        except grpc.RpcError as failure:
            error = error_of(failure, self._request_id)
        except HeatlensError as failure:
            failure.request_id = self._request_id
            error = failure
            call.cancel()
        finally:
            self._end(error)


def join(thread: threading.Thread | None) -> None:
    """Wait for a thread, at most JOIN_TIMEOUT_S. One that never ran, or is the caller's own, needs no waiting."""
    if thread is not None and thread is not threading.current_thread():
        with suppress(RuntimeError):
            thread.join(JOIN_TIMEOUT_S)
