"""What a real server tells the systemd that started it: a socket of this test stands where systemd's would."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from heatlens_server.service_manager import ServiceManager
from server_process import start_server_process
from server_toml import model_toml, server_toml

WATCHDOG_S = 0.6
TOML = server_toml(model_toml("tiny"), model_toml("broken"))


@pytest.fixture
def systemd(tmp_path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(tmp_path / "notify"))
        told.settimeout(60)
        yield told


def next_of(told: socket.socket, word: str) -> str:
    """The next thing that is told and has the word in it."""
    for _ in range(1000):
        if word in (line := told.recv(4096).decode()):
            return line
    raise AssertionError


def test_start_reload_signs_of_life_and_end_are_told(tmp_path, systemd):
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6))}
    server = start_server_process(tmp_path, TOML, env=environment)
    try:
        # It is alive while it loads.
        assert next_of(systemd, "=1") == "WATCHDOG=1"
        assert next_of(systemd, "READY") == "READY=1\nSTATUS=1 of 2 models are ready"
        assert next_of(systemd, "WATCHDOG") == next_of(systemd, "WATCHDOG") == "WATCHDOG=1"
        (tmp_path / "server.toml").write_text(server_toml(model_toml("tiny")))
        server.process.send_signal(signal.SIGHUP)
        assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", next_of(systemd, "RELOADING"))
        assert next_of(systemd, "READY") == "READY=1\nSTATUS=1 of 1 models are ready"
        server.process.terminate()
        assert next_of(systemd, "STOPPING") == "STOPPING=1"
        assert server.process.wait(timeout=60) == 0
    finally:
        server.process.kill()
        server.process.wait()


def test_nothing_is_told_where_nobody_asks():
    manager = ServiceManager({})
    manager.ready("1 of 1 models are ready")
    assert manager.watchdog_s is None


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_only_the_process_that_is_watched_shows_life_and_no_child_finds_the_socket(variables, watchdog_s):
    environment = {"NOTIFY_SOCKET": "/nowhere", "PATH": "/bin", **variables}
    assert ServiceManager(environment).watchdog_s == watchdog_s
    assert environment == {"PATH": "/bin"}


def test_a_service_manager_that_is_gone_is_a_warning(caplog):
    ServiceManager({"NOTIFY_SOCKET": "/nowhere/at/all"}).stopping()
    assert caplog.messages == ["the service manager is not told STOPPING=1: No such file or directory"]


def test_an_abstract_address_is_reached():
    name = f"heatlens-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(60)
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert told.recv(100) == b"STOPPING=1"


def test_the_unit_starts_what_there_is():
    unit = (Path(__file__).parents[2] / "deploy" / "heatlens.service").read_text()
    assert "ExecStart=/opt/heatlens/bin/heatlens-server serve --config " in unit
    stop_s = int(re.search(r"TimeoutStopSec=(\d+)", unit)[1])
    from heatlens_server.config import ServerConfig  # noqa: PLC0415
    from heatlens_server.ending import END_S  # noqa: PLC0415

    assert ServerConfig().grace_s + END_S < stop_s
