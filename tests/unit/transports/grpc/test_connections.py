"""What a look at connections makes of what the kernel counts and of what calls account for."""

import asyncio
import contextlib
import logging

import pytest

from heatlens_server.transports.grpc import connections
from heatlens_server.transports.grpc.connections import Places, watch_connections
from heatlens_server.transports.grpc.hang_up import Address
from heatlens_server.transports.grpc.traffic import Traffic

PEER, ADDRESS = "ipv4:10.0.0.1:1", ("10.0.0.1", 1)
MB = 1 << 20


class Kernel:
    """What it says at each look, and what calls read between that and when it is heard."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._received_bytes = 0
        self.looks = 0

    def connections_to(self, port: int) -> dict[Address, int]:
        self.looks += 1
        if self.looks == 1:
            raise OSError(24, "Too many open files")
        came = {ADDRESS: self._received_bytes}
        if self.looks % 4 == 0:
            self._traffic.account(PEER, 200 * MB)
            self._received_bytes += 200 * MB
        return came


async def test_what_is_read_after_the_kernel_has_counted_is_no_flood_and_no_files_is_no_end(monkeypatch, caplog):
    traffic = Traffic(MB)
    kernel = Kernel(traffic)
    monkeypatch.setattr(connections, "_LOOK_S", 0.001)
    monkeypatch.setattr(connections, "connections_to", kernel.connections_to)
    with caplog.at_level(logging.WARNING):
        watching = asyncio.create_task(watch_connections(1, traffic, max_connections=100, host_of=None))
        for _ in range(10_000):
            if kernel.looks > 20 or watching.done():
                break
            await asyncio.sleep(0.002)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    assert kernel.looks > 20
    assert "Too many open files" in caplog.text
    assert "floods" not in caplog.text


def places(most: int) -> Places:
    return Places(lambda address: address[0], most)


def of(host: str, *ports: int) -> list[Address]:
    return [(host, port) for port in ports]


def test_the_newest_of_a_host_that_has_too_many_give_way_where_all_are_busy_and_it_gets_no_more():
    made = places(8)
    old, new, other = of("a", *range(6)), of("a", 6, 7), of("b", 1)
    assert made.look(old, old, 0.0) == []
    assert made.crowds == []
    assert made.look([*new, *old], [*new, *old], 1.0) == new
    assert made.crowds == ["a"]
    # It gets no more until it has less than its share, whoever has the rest.
    assert made.look([*old, *other], [*old, *other], 2.0) == []
    assert made.crowds == ["a"]
    assert made.look([*old[1:], *other], old, 3.0) == []
    assert made.crowds == []


def test_those_without_a_call_for_a_while_come_first_and_those_of_the_host_that_has_most():
    made = places(8)
    some, others = of("a", *range(4)), of("b", *range(3))
    assert made.look([*some, *others], [], 0.0) == []
    assert made.look([*some, *others], some[:1], 1.9) == []
    assert made.look([*some, *others], some[:1], 2.0) == some[1:2]


@pytest.mark.parametrize("most", [1, 2, 3])
def test_of_few_places_one_host_may_have_all(most):
    made = places(most)
    every = of("a", *range(most))
    assert made.look(every, every, 0.0) == made.look(every, every, 9.0) == []
