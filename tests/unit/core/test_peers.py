"""Hosts of connections, and whose place a newcomer gets."""

import pytest

from heatlens_server.core.peers import gives_way, host_of


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.1.2.3:50000", "10.1.2.3"),
        ("ipv6:%5B::1%5D:1234", "::/64"),
        ("ipv6:[2001:db8:1:2:3:4:5:6]:1234", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:1234", "fe80::/64"),
        ("ipv6:%5B::ffff:10.1.2.3%5D:1234", "10.1.2.3"),
        ("unix:", "unix:"),
        ("", ""),
        ("ipv4:nonsense", "ipv4:nonsense"),
    ],
)
def test_the_host_of_a_connection(peer, host):
    assert host_of(peer) == host


def test_the_newest_of_the_host_that_holds_most_gives_way_until_all_hold_as_many():
    held = [("ipv4:10.0.0.1:1", "a0"), ("ipv4:10.0.0.1:2", "a1"), ("ipv4:10.0.0.2:1", "b0"), ("ipv4:10.0.0.1:3", "a2")]
    assert gives_way(held, "ipv4:10.0.0.3:1", host_of) == "a2"
    assert gives_way(held, "ipv4:10.0.0.2:9", host_of) == "a2"
    assert gives_way(held[:3], "ipv4:10.0.0.2:9", host_of) is None


def test_nobody_gives_way_to_its_own_host_or_where_nobody_is_told_apart():
    held = [(f"ipv4:10.0.0.1:{port}", port) for port in range(9)]
    assert gives_way(held, "ipv4:10.0.0.1:77", host_of) is None
    assert gives_way(held, "ipv4:10.0.0.2:77", lambda _peer: "") is None
    assert gives_way([], "ipv4:10.0.0.2:77", host_of) is None
