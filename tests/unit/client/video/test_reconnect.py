"""When a camera that dropped out is opened again, on a clock of our own."""

import errno

import pytest

from heatlens._video.reconnect import LONGEST_WAIT_S, reconnected


class Camera:
    """Plays a script, one entry per connection: how many frames it gives, and how it ends: None or an error's text.

    An attempt to open it takes `attempt_s`, a frame no time.
    """

    def __init__(self, *script, attempt_s=0.0):
        self.script = list(script)
        self.attempt_s = attempt_s
        self.time_s = 100.0
        self.attempts_s = []
        self.waits = []
        self.told = []
        self.closed = 0
        self.left = False

    def connect(self):
        self.attempts_s.append(self.time_s - 100)
        self.time_s += self.attempt_s
        count, error = self.script.pop(0) if self.script else (0, "refused")
        try:
            yield from [f"{len(self.attempts_s)}.{index}" for index in range(count)]
            if error is not None:
                raise OSError(errno.ECONNREFUSED, error, "cam")
        finally:
            self.closed += 1

    def wait(self, seconds):
        self.waits.append(seconds)
        self.time_s += seconds
        return self.left

    def frames(self, timeout_s=60.0):
        return reconnected(
            self.connect(),
            self.connect,
            name="cam",
            timeout_s=timeout_s,
            wait=self.wait,
            tell=self.told.append,
            now=lambda: self.time_s,
        )


def take(frames, count):
    return [next(frames) for _ in range(count)]


@pytest.mark.parametrize("end", [None, "reset"])
def test_a_camera_that_comes_back_goes_on(end):
    camera = Camera((2, end), (0, "refused"), (0, None), (3, None))
    frames = camera.frames()
    assert take(frames, 5) == ["1.0", "1.1", "4.0", "4.1", "4.2"]
    assert camera.waits == [0.5, 1, 2]
    assert camera.told == [
        f"cam: dropped out: {end or 'its frames ended'}; it is opened again for 60 s",
        "cam: is back after 3.5 s",
    ]
    assert camera.closed == 3
    frames.close()
    assert camera.closed == 4


def test_the_next_time_it_drops_out_is_counted_anew():
    camera = Camera((1, None), (0, "no"), (1, None), (1, None))
    take(camera.frames(timeout_s=2), 3)
    assert camera.waits == [0.5, 1, 0.5]
    assert len(camera.told) == 4


def test_one_that_stays_away_is_an_error_after_the_time():
    camera = Camera((1, None), attempt_s=1.0)
    frames = camera.frames(timeout_s=30)
    next(frames)
    with pytest.raises(OSError, match="dropped out and did not come back within 30 s: refused") as caught:
        next(frames)
    assert (caught.value.errno, caught.value.filename) == (errno.ECONNREFUSED, "cam")
    # Attempts get rarer, up to a limit, and none begins later than the time allows.
    assert camera.waits[:5] == [0.5, 1, 2, 4, LONGEST_WAIT_S]
    assert max(camera.waits) == LONGEST_WAIT_S
    assert max(camera.attempts_s) <= 1 + 30
    assert len(camera.told) == 1


def test_without_time_it_is_not_opened_again():
    camera = Camera((2, None), (2, None))
    frames = camera.frames(timeout_s=0)
    take(frames, 2)
    with pytest.raises(ConnectionAbortedError, match="dropped out: its frames ended"):
        next(frames)
    assert (camera.waits, camera.told) == ([], [])


def test_a_reader_that_leaves_while_it_waits_ends_it():
    camera = Camera((1, None), (1, None))
    frames = camera.frames()
    next(frames)
    camera.left = True
    assert list(frames) == []
    assert len(camera.attempts_s) == 1


def test_other_errors_are_not_hidden():
    def broken():
        yield 1
        raise ValueError("a bug")

    frames = reconnected(broken(), broken, name="cam", timeout_s=60, wait=pytest.fail, tell=pytest.fail)
    next(frames)
    with pytest.raises(ValueError, match="a bug"):
        next(frames)
