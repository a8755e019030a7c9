"""Which connections are closed, as what they do or do not keeps others out: idle ones, and those of hosts that flood.

gRPC closes what comes beyond the limit of connections unseen, so that as many idle ones as there may be would keep
everybody else out. Clients connect anew by themselves when they make a call.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypeVar

from heatlens_server.transports.grpc.floods import Came, Floods
from heatlens_server.transports.grpc.hang_up import Address, address_of, close_connections, connections_to
from heatlens_server.transports.grpc.refused_hosts import refuse_hosts
from heatlens_server.transports.grpc.traffic import Traffic

T = TypeVar("T")

_log = logging.getLogger("heatlens.connections")

_LOOK_S = 0.5
"""How often connections are looked at, in seconds."""

_IDLE_S = 2.0
"""How long a connection is without a call before it gives way, in seconds."""

_FULL, _ROOMY = 7 / 8, 3 / 4
"""From which share of the places on connections give way, and how many are taken then."""


async def watch_connections(
    port: int,
    traffic: Traffic,
    *,
    max_connections: int,
    host_of: Callable[[str], Hashable] | None,
    refuses_floods: bool = True,
) -> None:
    """Close connections of hosts that flood, and idle ones while nearly all places are taken, until it is cancelled.

    Args:
        port: of the server.
        traffic: the calls of its connections.
        max_connections: the places.
        host_of: the host of a peer; None: each connection is a host of its own.
        refuses_floods: whether connections are closed for what they send.
    """
    floods = Floods(_host_of_address(host_of))
    idle_since: dict[Address, float] = {}
    refused: list[Hashable] = []
    while True:
        await asyncio.sleep(_LOOK_S)
        accounted, left = traffic.take()
        received = await _apart(connections_to, port)
        now = time.monotonic()
        # What is read after the kernel has counted may belong to either time: it is room now, and accounted for next.
        room = traffic.room() + traffic.accounted_since()
        came = _came(received, accounted, room, left)
        close, began = floods.look(came, now) if refuses_floods else ([], [])
        if host_of is not None and (banned := floods.banned(now)) != refused:
            refused = banned
            await _apart(refuse_hosts, port, list(map(str, banned)))
        for host, _ in began:
            _log.warning("%s floods: its connections are closed, and it cannot connect for a while", host)
        calling = {address_of(peer) for peer in traffic.busy}
        idle_since = {one: idle_since.get(one, now) for one in received if one not in calling}
        if len(received) >= _FULL * max_connections:
            waiting = sorted(
                (one for one in idle_since if now - idle_since[one] >= _IDLE_S), key=idle_since.__getitem__
            )
            close += _giving_way(received, waiting, len(received) - int(_ROOMY * max_connections))
        if close:
            await _apart(close_connections, set(close))


def _giving_way(connections: Collection[Address], idle: list[Address], count: int) -> list[Address]:
    """So many of the idle connections: of the host that has most first, the one that is idle longest of them."""
    hosts = Counter(host for host, _ in connections)
    chosen: list[Address] = []
    while idle and len(chosen) < count:
        one = max(idle, key=lambda address: hosts[address[0]])
        idle.remove(one)
        hosts[one[0]] -= 1
        chosen.append(one)
    return chosen


async def _apart(function: Callable[..., T], *arguments: object) -> T:
    """Call on a thread what asks for copies of descriptors, again and again while no file is left."""
    while True:
        try:
            return await asyncio.to_thread(function, *arguments)
        except OSError as error:
            _log.warning("cannot look at connections: %s", error.strerror)
            await asyncio.sleep(_LOOK_S)


def _came(
    received: Mapping[Address, int], accounted: Counter[str], room: Counter[str], left: Mapping[str, float]
) -> dict[Address, Came]:
    peers = {address: peer for peer in {*accounted, *left, *room} if (address := address_of(peer)) is not None}
    return {
        address: Came(received.get(address, 0), accounted[peer], room[peer], left.get(peer, 0.0))
        for address in {*received, *peers}
        for peer in [peers.get(address, "")]
    }


def _host_of_address(host_of: Callable[[str], Hashable] | None) -> Callable[[Address], Hashable]:
    def of(address: Address) -> Hashable:
        host, port = address
        if host_of is None:
            return address
        return host_of(f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}")

    return of
