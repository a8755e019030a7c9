"""Frames go out on a thread of their own, while the answers come in: decoding and drawing overlap with the server."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress

from heatlens._exceptions import HeatlensError
from heatlens._frame_result import FrameResult
from heatlens._stream import Stream
from heatlens._video.source import VideoFrame

# A stream that drops frames takes hundreds while nobody reads. In a film that is slow to draw and write, they would be
# gigabytes of pixels: beyond two windows, which keep the server busy, and these, cameras wait, and lose frames.
_SPARE_FRAMES = 16
# How long a feed that ends early waits for a frame that is being read.
_JOIN_TIMEOUT_S = 5.0


def answers(stream: Stream, frames: Iterable[VideoFrame]) -> Generator[tuple[VideoFrame, FrameResult], None, None]:
    """Send frames and yield each with its answer, in order. Closes the stream at the end, however it comes.

    The film's clock goes with the frames, so that a limit in frames per second counts film, not the time that a file
    takes to be read.

    Args:
        stream: an open stream, unused so far.
        frames: pulled in a thread of its own, a bounded number ahead of the answers yielded.

    Raises:
        HeatlensError: the stream broke; or a frame cannot be sent, after the answers of all frames before it.
        Exception: whatever `frames` raises, after the answers of the frames before.
    """
    unanswered: deque[VideoFrame] = deque()
    ahead = threading.Semaphore(2 * stream.window + _SPARE_FRAMES)
    over = threading.Event()
    trouble: list[Exception] = []
    start_s = time.time()

    def feed() -> None:
        try:
            # First the permit, then the frame: a camera's frame must not get old in here.
            iterator = iter(frames)
            while ahead.acquire() and not over.is_set() and (frame := next(iterator, None)) is not None:
                unanswered.append(frame)
                stream.send(frame.pixels, frame_id=frame.frame_id, capture_time=start_s + frame.time_s)
        except Exception as error:
            trouble.append(error)
        # Not on a stream that is broken or closed, of which the reader is told.
        with suppress(HeatlensError):
            stream.finish()

    thread = threading.Thread(target=feed, name="heatlens-feed", daemon=True)
    thread.start()
    try:
        for answer in stream:
            yield unanswered.popleft(), answer
            ahead.release()
    finally:
        over.set()
        ahead.release()
        stream.close()
        thread.join(_JOIN_TIMEOUT_S)
    if trouble:
        raise trouble[0]
