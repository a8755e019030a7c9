"""A process that was told to end ends, whatever its threads do."""

import signal
import subprocess
import sys

import pytest

PATIENCE_S = 60

PROGRAM = """
import ctypes, faulthandler, logging, signal, sys, threading, time
from heatlens_server import ending
ending.END_S, ending._NATIVE_S = 0.2, 0.5
logging.basicConfig()
last_resort = ending.LastResort(grace_s=float(sys.argv[2]))
ending.handle_signals(lambda: None, last_resort)
def busy():
    print("busy", flush=True)
    while True:
        pass
def locked():
    print("busy", flush=True)
    ctypes.PyDLL(None).sleep(3600)
if sys.argv[1] == "busy":
    busy()
armed, arm = threading.Event(), faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda *left_s, **options: (arm(*left_s, **options), armed.set())
last_resort.tell()
armed.wait()
if sys.argv[1] == "waiting":
    threading.Event().wait()
locked()
"""


def start(what: str, grace_s: float = 0.0) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PROGRAM, what, str(grace_s)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_main_thread_that_is_busy_is_ended_and_the_log_says_with_what(number):
    with start("busy") as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(number)
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "the server did not end in time" in log
    assert "thread MainThread:" in log
    assert "in busy" in log


def test_a_main_thread_that_waits_is_ended():
    with start("waiting") as process:
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "thread MainThread:" in log


def test_a_thread_that_keeps_the_interpreters_lock_is_ended():
    with start("locked") as process:
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    # Written by the C code of faulthandler.
    assert "in locked" in log


def test_a_second_signal_ends_the_grace():
    with start("busy", grace_s=3600.0) as process:
        assert process.stdout.readline() == "busy\n"
        process.terminate()
        process.terminate()
        # Signals of one number that wait are one: more are sent until the second is seen.
        while process.poll() is None:
            process.terminate()
        assert process.returncode == 1
        process.communicate()
