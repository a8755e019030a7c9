"""Ctrl-C and SIGTERM wait for writes, and for nothing else."""

import signal
import threading

import pytest

from heatlens._cli.interrupt import Interrupts, Terminated

pytestmark = pytest.mark.usefixtures("ctrl_c_interrupts")


def test_an_interrupt_is_raised_at_once():
    reached = []

    def run():
        with Interrupts():
            signal.raise_signal(signal.SIGINT)
            reached.append("too much")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_waits_for_the_end_of_a_write():
    written = []

    def run():
        with Interrupts() as interrupts:
            with interrupts.held_back():
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
                written.append("all")
            written.append("too much")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert written == ["all"]


def test_without_an_interrupt_nothing_happens():
    with Interrupts() as interrupts, interrupts.held_back():
        pass
    with interrupts.held_back():
        pass


def test_who_ignores_interrupts_still_does():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interrupts() as interrupts, interrupts.held_back():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_threads_leave_the_handler_alone():
    seen = []

    def run():
        with Interrupts() as interrupts, interrupts.held_back():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert seen == [signal.default_int_handler]


def test_sigterm_is_told_apart():
    before = signal.getsignal(signal.SIGTERM)
    written = []

    def run():
        with Interrupts() as interrupts:
            with interrupts.held_back():
                signal.raise_signal(signal.SIGTERM)
                # The first one counts.
                signal.raise_signal(signal.SIGINT)
                written.append("all")
            written.append("too much")

    with pytest.raises(Terminated):
        run()
    assert written == ["all"]
    assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL


def test_who_handles_sigterm_still_does():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("term"))
    try:
        with Interrupts():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["term"]
