"""Ctrl-C of `heatlens explain` while a server keeps it waiting."""

import signal
import socket
import threading
from contextlib import closing

import pytest

from cli_process import start_cli

TIMEOUT_S = 120
QUICKLY_S = 20


@pytest.fixture
def explain(tmp_path):
    """Start `heatlens explain` on twelve images, more than are sent at once."""
    paths = [tmp_path / f"{index}.jpg" for index in range(12)]
    for path in paths:
        path.write_bytes(b"whatever")
    running = []

    def start(address):
        running.append(start_cli("explain", "--server", address, "--timeout", TIMEOUT_S, *paths))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def assert_ends_quietly(process):
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr


def test_interrupt_does_not_wait_for_open_calls(explain, peer):
    arrived, release = threading.Event(), threading.Event()
    peer.replies.appendleft(lambda request, context: arrived.set() or (release.wait(TIMEOUT_S) and peer.answer()))
    peer.replies.extendleft([peer.replies[0]] * 7)
    try:
        process = explain(peer.address)
        assert arrived.wait(QUICKLY_S)
        assert_ends_quietly(process)
    finally:
        release.set()


def test_interrupt_while_connecting_to_what_never_answers(explain):
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        process = explain(f"127.0.0.1:{listener.getsockname()[1]}")
        listener.settimeout(QUICKLY_S)
        with closing(listener.accept()[0]):
            assert_ends_quietly(process)
