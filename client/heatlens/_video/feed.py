"""Send the frames of a film and yield their answers: a thread sends, so that decoding overlaps with the server."""

import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from queue import SimpleQueue

from heatlens._exceptions import HeatlensError, InvalidArgumentError
from heatlens._results.results import FrameResult
from heatlens._stream.stream import Stream
from heatlens._video.source import VideoFrame

# A stream that drops frames accepts hundreds before their answers are read. Where drawing is slow, these would be
# gigabytes of pixels. So at most two windows, which keep the server busy, and these are sent ahead of the answers read.
_SPARE_FRAMES = 16
# How long a feed that ends early waits for a frame that is being read.
_JOIN_TIMEOUT_S = 5.0


def answers(stream: Stream, frames: Iterable[VideoFrame]) -> Generator[tuple[VideoFrame, FrameResult], None, None]:
    """Send frames and yield each with its answer, in order. Closes the stream at the end, however it comes.

    The film's clock goes with the frames, so that a limit in frames per second counts film, not the time that a file
    takes to be read. A frame that cannot be sent, for example because it is too wide for a JPEG, is answered with that
    error.

    Args:
        stream: an open stream, unused so far.
        frames: pulled in a thread of its own, a bounded number ahead of the answers yielded.

    Raises:
        HeatlensError: the stream broke.
        Exception: whatever `frames` raises, after the answers of the frames before.
    """
    # Each frame with the answer that it has because it could not be sent, or None; None after the last one.
    sent: SimpleQueue[tuple[VideoFrame, FrameResult | None] | None] = SimpleQueue()
    permits = threading.Semaphore(2 * stream.window + _SPARE_FRAMES)
    ended = threading.Event()
    errors: list[Exception] = []
    start_s = time.time()

    def feed() -> None:
        try:
            # First the permit, then the frame: a camera's frame must not get old in here.
            iterator = iter(frames)
            while permits.acquire() and not ended.is_set() and (frame := next(iterator, None)) is not None:
                sent.put((frame, _send(stream, frame, start_s + frame.time_s)))
        except Exception as error:
            errors.append(error)
        # On a broken or closed stream this raises what the reader gets as well.
        with suppress(HeatlensError):
            stream.finish()
        sent.put(None)

    thread = threading.Thread(target=feed, name="heatlens-feed", daemon=True)
    thread.start()
    try:
        received = iter(stream)
        while (item := sent.get()) is not None:
            frame, refusal = item
            answer = refusal or next(received, None)
            if answer is None:
                break
            yield frame, answer
            permits.release()
        # How the stream ends: it may be with an error.
        next(received, None)
    finally:
        ended.set()
        permits.release()
        stream.close()
        thread.join(_JOIN_TIMEOUT_S)
    if errors:
        raise errors[0]


def _send(stream: Stream, frame: VideoFrame, capture_time_s: float) -> FrameResult | None:
    """Send a frame; returns its answer if it cannot be sent and the stream lives. Raises HeatlensError if not."""
    started_s = time.monotonic()
    try:
        stream.send(frame.pixels, frame_id=frame.frame_id, capture_time=capture_time_s)
    except InvalidArgumentError as error:
        # A server that breaks the stream off may call a frame invalid, too; that has an id.
        if error.request_id is not None:
            raise
        return FrameResult(
            frame_id=frame.frame_id,
            frame=frame.pixels,
            result=None,
            error=error,
            skipped=False,
            latency_ms=(time.monotonic() - started_s) * 1000,
        )
    return None
