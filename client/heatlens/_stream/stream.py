# Generated from heatlens/_stream/async_stream.py by client/unasync.py; do not edit.
"""Streams for threads."""

import threading
import time
from collections.abc import Generator, Iterable
from functools import partial
from types import TracebackType
from typing import Self

from heatlens._exceptions import HeatlensError
from heatlens._results.images import ImageSource
from heatlens._results.results import FrameResult
from heatlens._stream.link import Link
from heatlens._stream.map_run import MapRun
from heatlens._stream.window import state_error
from heatlens._wire.streams import CaptureTime, Started, refusal_of, timestamp_of


class Stream:
    """Explains the frames of one video, in order. Made by `Client.stream`; a context manager.

        with Client("localhost:50051") as client, client.stream(overflow="drop-oldest") as stream:
            for item in stream.map(camera_frames()):
                if item.result is not None:
                    show(item.result.explanations[0].heatmap.overlay(item.frame))

    Use `map`, or `send` and `receive`; these two may be called from different threads. A frame that fails is a value,
    `FrameResult.error`. A stream that breaks raises, after the answers that came before, a HeatlensError whose
    `last_frame_id` tells where a new stream can go on. The stream sends no frame twice,
    unless it is asked to `resume`.

    The stream opens with the `with` statement or at its first use, within the client's timeout.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        # Held by `send` from the choice of the id to the sending: frames leave in the order of their ids.
        self._sending = threading.Lock()
        self._run: MapRun | None = None

    def __repr__(self) -> str:
        started = self._link.started
        state = "closed" if self._link.closed else f"window={started.window}" if started else "not open"
        return f"{type(self).__name__}({state})"

    def __enter__(self) -> Self:
        try:
            self._link.open()
        except BaseException:
            # Also Ctrl-C while waiting for the server: no __exit__ follows.
            self._link.close(gracefully=False)
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(gracefully=exc_type is None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> FrameResult:
        item = self._receive()
        if item is None:
            raise StopIteration
        return item

    @property
    def window(self) -> int:
        """The window in force: most unanswered frames. Raises FailedPreconditionError before the stream is open."""
        return self._started().window

    @property
    def model(self) -> str:
        """Name of the model that answers. Raises FailedPreconditionError before the stream is open."""
        return self._started().model

    @property
    def model_version(self) -> str:
        """Version of the model that answers. Raises FailedPreconditionError before the stream is open."""
        return self._started().model_version

    @property
    def last_frame_id(self) -> int | None:
        """The last frame answered, whether its answer was received yet or not; None before the first."""
        return self._link.window.last_frame_id

    def map(self, frames: Iterable[ImageSource]) -> Generator[FrameResult, None, None]:
        """Explain frames and yield one answer for each, in order.

        Frames are pulled in a thread of their own:
        with overflow="block" at most `window` frames ahead of the loop; with "drop-oldest" as they come, and when the
        server or the loop is late, older frames are answered `dropped`. Leaving the loop stops the pulling (it waits at
        most a second for a frame that is on its way) and forgets the answers still to come.

        Args:
            frames: paths, bytes of image files, or arrays of pixels, as for `explain`. Ids count on from the last
                frame's, from 0 in a new stream; the capture time is when a frame is pulled.

        Raises:
            InvalidArgumentError: not an iterable of frames.
            FailedPreconditionError: the stream is closed or finished, or in use already.
            HeatlensError: the stream broke; `last_frame_id` is the last frame answered.
            Exception: whatever the iterable raises, after the answers of the frames before.
        """
        return self._map(MapRun(frames))

    def send(self, frame: ImageSource, *, frame_id: int | None = None, capture_time: CaptureTime | None = None) -> int:
        """Send a frame and return its id.

        With overflow="block" it waits while `window` frames are unanswered; with "drop-oldest" it does not, and
        older frames are dropped. In both it waits while hundreds of answers are not received; with "block" also while
        more than a window of results is not received and their maps fill 64 MiB.

        Args:
            frame: a path, the bytes of an image file, or an array of pixels, as for `explain`.
            frame_id: at least 0, and larger than the last one. None: one more than the last one.
            capture_time: a datetime with a time zone, or seconds since 1970. Counts for `max_fps`.

        Raises:
            InvalidArgumentError: an argument is wrong. Nothing was sent; the stream lives.
            FileNotFoundError: there is no such file (another OSError if it cannot be read). The stream lives.
            FailedPreconditionError: the stream is closed or finished, or a `map` is running.
            HeatlensError: the stream broke.
        """
        accepted_s = time.monotonic()
        captured = timestamp_of(capture_time)
        self._link.open()
        window = self._link.window
        with self._sending:
            with self._link.lock:
                self._check_free()
                window.check_accepts()
                frame_id = window.checked_id(frame_id)
            while not self._link.put(frame, frame_id, captured=captured, accepted_s=accepted_s):
                # Finished or broken meanwhile: this raises.
                window.check_accepts()
        return frame_id

    def receive(self) -> FrameResult:
        """Wait for the next answer and return it. Iterating over the stream does so until the end.

        Raises:
            FailedPreconditionError: the stream is finished and every answer received, or closed, or a `map` is
                running.
            HeatlensError: the stream broke.
        """
        item = self._receive()
        if item is None:
            raise state_error("STREAM_FINISHED", "the stream is finished: every answer was received")
        return item

    def finish(self) -> None:
        """Say that no frames follow. Iteration ends after the answers that are due. Idempotent."""
        if not self._link.closed:
            self._link.open()
            with self._link.lock:
                self._link.window.finish()
                self._link.notify(all_waiting=True)

    def close(self) -> None:
        """End the stream; frames still unanswered are cancelled. Idempotent, from any thread."""
        self._close(gracefully=True)

    def _receive(self) -> FrameResult | None:
        self._link.open()
        self._check_free()
        return self._link.take()

    def _map(self, run: MapRun) -> Generator[FrameResult, None, None]:
        self._link.open()
        window = self._link.window
        with self._link.lock:
            self._check_free()
            window.check_accepts()
            if window.ahead:
                raise state_error("STREAM_BUSY", "frames passed to `send` wait for `receive`")
            self._run = run

        def complete() -> bool:
            # A broken stream has lost answers and says so itself, unless the iterable failed: that came first.
            return run.error is not None if window.ended else run.done and window.ahead == 0

        try:
            run.start(partial(self._pump, run))
            while (item := self._link.take(complete)) is not None:
                yield item
                del item
            if run.error is not None:
                raise run.error
        finally:
            self._stop(run)

    def _pump(self, run: MapRun) -> None:
        """Pull frames and send them, while the loop over `map` runs."""
        link, window = self._link, self._link.window

        def over() -> bool:
            return window.ended or window.finishing or run.stopped

        try:
            while (frame_id := link.wait_to_pull(over)) is not None:
                frame = next(run.frames)
                accepted_s, captured = time.monotonic(), timestamp_of(time.time())
                try:
                    link.put(frame, frame_id, captured=captured, accepted_s=accepted_s, stopped=over)
                except (HeatlensError, OSError) as error:
                    refusal = refusal_of(error)
                    with link.lock:
                        if not over():
                            window.refuse(frame_id, frame, refusal, accepted_s=accepted_s, now_s=time.monotonic())
                            link.notify()
                # Free the frame's memory while this waits for the next.
                del frame
        except StopIteration:
            pass
        except BaseException as error:
            # The caller's iterable raised: `map` passes it on.
            run.error = error
        finally:
            with link.lock:
                run.done = True
                link.notify(all_waiting=True)

    def _stop(self, run: MapRun) -> None:
        """End a `map`, wherever it is."""
        with self._link.lock:
            run.stopped = True
            if self._run is run:
                self._run = None
                self._link.window.forget()
            self._link.notify(all_waiting=True)
        run.join()

    def _close(self, *, gracefully: bool) -> None:
        run = self._run
        self._link.close(gracefully=gracefully and run is None)
        if run is not None:
            self._stop(run)

    def _started(self) -> Started:
        if self._link.started is None:
            raise state_error("STREAM_NOT_OPEN", "the stream is not open yet")
        return self._link.started

    def _check_free(self) -> None:
        self._link.wait_free(lambda: self._run is None)
        if self._run is not None:
            raise state_error("STREAM_BUSY", "a `map` is running")
