"""Hosts that the kernel keeps from a port. Those of 127.0.0.0/8 are hosts of their own."""

import socket
from collections.abc import Iterator

import pytest

from heatlens_server.transports.grpc.refused_hosts import refuse_hosts

FREE, REFUSED, OTHER = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture
def port() -> Iterator[int]:
    """Listens for both families by one socket, as gRPC does."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
        yield listening.getsockname()[1]


def connects(port: int, source: str, timeout_s: float) -> bool:
    to = "::1" if ":" in source else "127.0.0.1"
    try:
        socket.create_connection((to, port), timeout=timeout_s, source_address=(source, 0)).close()
    except TimeoutError:
        return False
    return True


def test_those_that_are_named_cannot_connect_and_all_others_can(port):
    refuse_hosts(port, ["2001:db8::/64", REFUSED, OTHER, "unix:"])
    assert not connects(port, REFUSED, 0.3)
    assert not connects(port, OTHER, 0.3)
    assert connects(port, FREE, 20)
    assert connects(port, "::1", 20)
    refuse_hosts(port, [OTHER])
    assert connects(port, REFUSED, 20)
    assert not connects(port, OTHER, 0.3)
    refuse_hosts(port, [])
    assert connects(port, OTHER, 20)


def test_of_ipv6_it_is_networks(port):
    refuse_hosts(port, [REFUSED, "2001:db8::/64", "::/64"])
    assert not connects(port, "::1", 0.3)
    assert connects(port, FREE, 20)


def test_more_than_a_filter_holds_are_the_last_of_them(port):
    refuse_hosts(port, [f"10.0.{number // 256}.{number % 256}" for number in range(5000)] + [REFUSED])
    assert not connects(port, REFUSED, 0.3)
    assert connects(port, FREE, 20)


def test_another_port_is_not_meant(port):
    refuse_hosts(port + 1, [FREE])
    assert connects(port, FREE, 20)
