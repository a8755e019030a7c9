"""Opening in another thread, and giving up on it."""

import signal
import threading
from types import SimpleNamespace

import pytest

from heatlens._video.opening import opened_aside


def test_what_is_opened_is_returned_and_what_is_raised_is_raised():
    source = SimpleNamespace()
    assert opened_aside(lambda: source) is source

    def fail():
        raise OSError(2, "gone", "there")

    with pytest.raises(OSError, match="gone") as caught:
        opened_aside(fail)
    assert caught.value.filename == "there"


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_an_interrupt_does_not_wait_and_what_opens_late_is_closed():
    gate, closed = threading.Event(), threading.Event()

    def hang():
        # The signal reaches the main thread while it waits for this one.
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        assert gate.wait(10)
        return SimpleNamespace(close=closed.set)

    with pytest.raises(KeyboardInterrupt):
        opened_aside(hang)
    assert not gate.is_set()
    gate.set()
    assert closed.wait(10)
