"""The thread that feeds a stream, with a stream made by hand."""

import queue
import threading

import numpy as np
import pytest

from heatlens import InvalidArgumentError, UnavailableError
from heatlens._video.feed import answers
from heatlens._video.source import VideoFrame

PATIENCE_S = 10


class Echo:
    """A stream that answers each frame with its id when it is asked."""

    def __init__(self, window=2):
        self.window = window
        self.sent = queue.SimpleQueue()
        self.capture_times = []
        self.closed = threading.Event()
        self.finished = threading.Event()
        self.breaks_after = None
        self.refused = ()
        self.refusal = InvalidArgumentError.of("frame", "cannot be a JPEG")

    def send(self, frame, *, frame_id, capture_time):
        if self.closed.is_set():
            raise UnavailableError("closed")
        if frame_id in self.refused:
            raise self.refusal
        self.capture_times.append(capture_time)
        self.sent.put(frame_id)

    def finish(self):
        self.finished.set()
        self.sent.put(None)

    def close(self):
        self.closed.set()

    def __iter__(self):
        while (frame_id := self.sent.get(timeout=PATIENCE_S)) is not None:
            if frame_id == self.breaks_after:
                raise UnavailableError("broken")
            yield frame_id


def frames(count, pulled=None):
    for index in range(count):
        if pulled is not None:
            pulled.append(index)
        yield VideoFrame(index, index / 10, np.zeros((1, 1, 3), np.uint8))


def no_feeder_runs():
    return not any(thread.name == "heatlens-feed" for thread in threading.enumerate())


def test_every_frame_comes_with_its_answer():
    stream = Echo()
    pairs = [(frame.frame_id, answer) for frame, answer in answers(stream, frames(200))]
    assert pairs == [(index, index) for index in range(200)]
    assert stream.finished.is_set()
    assert stream.closed.is_set()
    assert no_feeder_runs()


def test_the_films_clock_goes_along():
    stream = Echo()
    list(answers(stream, frames(30)))
    assert np.diff(stream.capture_times) == pytest.approx(0.1, abs=1e-5)


def test_frames_are_pulled_a_bounded_number_ahead():
    pulled = []
    stream = Echo(window=3)
    feed = answers(stream, frames(500, pulled))
    taken = 0
    for _ in feed:
        taken += 1
        # 2 windows and 16.
        assert len(pulled) - taken <= 2 * 3 + 16 + 1
    assert taken == 500


def test_what_the_frames_raise_comes_after_the_answers():
    def breaks_off():
        yield from frames(5)
        raise OSError(5, "gone", "camera 0")

    feed = answers(Echo(), breaks_off())
    assert [answer for _, answer in (next(feed) for _ in range(5))] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(feed)
    assert no_feeder_runs()


def test_a_broken_stream_raises_and_ends_the_feeder():
    stream = Echo()
    stream.breaks_after = 7
    taken = []
    with pytest.raises(UnavailableError, match="broken"):
        taken.extend(answer for _, answer in answers(stream, frames(100_000)))
    assert stream.closed.is_set()
    assert no_feeder_runs()


def test_leaving_early_ends_the_feeder():
    stream = Echo()
    feed = answers(stream, frames(100_000))
    next(feed)
    feed.close()
    assert stream.closed.is_set()
    assert no_feeder_runs()


@pytest.mark.parametrize("refused", [{0}, {3, 4, 9}, range(100)])
def test_a_frame_that_cannot_be_sent_fails_alone_and_in_its_place(refused):
    stream = Echo()
    stream.refused = refused
    pairs = list(answers(stream, frames(100)))
    assert [frame.frame_id for frame, _ in pairs] == list(range(100))
    for frame, answer in pairs:
        if frame.frame_id in refused:
            assert answer.frame_id == frame.frame_id
            assert answer.error is stream.refusal
            assert answer.result is None
            assert not answer.skipped
            assert answer.latency_ms >= 0
        else:
            assert answer == frame.frame_id
    assert no_feeder_runs()


def test_a_server_that_calls_a_frame_invalid_ends_the_film():
    stream = Echo()
    stream.refused = {5}
    stream.refusal = InvalidArgumentError("no", request_id="r1")
    taken = []
    with pytest.raises(InvalidArgumentError, match="no"):
        taken.extend(answer for _, answer in answers(stream, frames(100)))
    assert taken == [0, 1, 2, 3, 4]
    assert no_feeder_runs()
