"""Closing the connection of one peer, by its name."""

import socket

import pytest

from heatlens_server.transports.grpc.hang_up import connections_to, hang_up


@pytest.fixture(params=["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def pair(request):
    """A connection's two ends, the server's first."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind((request.param, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()[:2]) as client, listener.accept()[0] as server:
            yield server, client


def test_a_connection_is_closed_by_its_peers_name_and_no_other(pair):
    server, client = pair
    host, port = server.getpeername()[:2]
    host = host.removeprefix("::ffff:")
    name = f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"
    assert not hang_up(name.replace(str(port), "1"))
    assert not hang_up("unix:")
    client.settimeout(20)
    assert hang_up(name)
    assert client.recv(1) == b""


def test_what_came_on_a_connection_is_counted_read_or_not(pair):
    server, client = pair
    client.sendall(bytes(5000))
    assert len(server.recv(5000, socket.MSG_WAITALL)) == 5000
    client.sendall(bytes(7))
    server.recv(7, socket.MSG_PEEK | socket.MSG_WAITALL)
    host, port = client.getsockname()[:2]
    assert connections_to(server.getsockname()[1]) == {(host.removeprefix("::ffff:"), port): 5007}
