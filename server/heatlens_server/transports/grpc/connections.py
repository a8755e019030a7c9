"""Which connections are closed, as what they do or do not keeps others out: idle ones, and those of hosts that flood.

gRPC closes what comes beyond the limit of connections unseen, so that as many idle ones as there may be would keep
everybody else out. Clients connect anew by themselves when they make a call.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Container, Hashable, Mapping
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
"""From which share of the places on connections give way, and how many are taken then, of one host at most."""


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
    host_of_address = _host_of_address(host_of)
    floods, places = Floods(host_of_address), Places(host_of_address, max_connections)
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
        close += places.look(received, {address_of(peer) for peer in traffic.busy}, now)
        unwelcome = [*floods.banned(now), *places.crowds]
        if host_of is not None and unwelcome != refused:
            refused = unwelcome
            await _apart(refuse_hosts, port, list(map(str, unwelcome)))
        for host, _ in began:
            _log.warning("%s floods: its connections are closed, and it cannot connect for a while", host)
        if close:
            await _apart(close_connections, set(close))


class Places:
    """Who gives way where nearly all places are taken.

    Attributes:
        crowds: hosts that hold so many that they get no more.
    """

    def __init__(self, host_of: Callable[[Address], Hashable], max_connections: int) -> None:
        """Nobody has been seen. Arguments: as `watch_connections`."""
        self._host_of = host_of
        self._full, self._roomy = _FULL * max_connections, math.ceil(_ROOMY * max_connections)
        self._since: dict[Address, float] = {}
        self._idle_since: dict[Address, float] = {}
        self.crowds: list[Hashable] = []

    def look(self, connections: Collection[Address], busy: Container[Address | None], now_s: float) -> list[Address]:
        """Those to close: idle ones of the host that has most first, and then the newest of one that has too many."""
        self._since = {one: self._since.get(one, now_s) for one in connections}
        self._idle_since = {one: self._idle_since.get(one, now_s) for one in connections if one not in busy}
        hosts = Counter(map(self._host_of, connections))
        is_full = len(connections) >= self._full
        crowds = [host for host, count in hosts.items() if count >= self._roomy and (is_full or host in self.crowds)]
        for host in crowds:
            if host not in self.crowds:
                _log.warning("%s has %d connections and gets no more, as nearly all are taken", host, hosts[host])
        self.crowds = crowds
        if not is_full:
            return []
        idle = sorted(
            (one for one, since_s in self._idle_since.items() if now_s - since_s >= _IDLE_S),
            key=self._idle_since.__getitem__,
        )
        chosen: list[Address] = []
        while idle and len(chosen) < len(connections) - self._roomy:
            one = max(idle, key=lambda address: hosts[self._host_of(address)])
            idle.remove(one)
            hosts[self._host_of(one)] -= 1
            chosen.append(one)
        for host in crowds:
            own = [one for one in self._since if self._host_of(one) == host and one not in chosen]
            own.sort(key=self._since.__getitem__)
            chosen += own[self._roomy :]
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
