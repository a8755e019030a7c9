"""Which hosts flood: their connections send much that belongs to no call, or calls that they leave at once.

gRPC's core reads and answers all of it before any handler, and knows no limit: frames of PING and SETTINGS by the
million keep its threads, and thousands of calls that are reset end the waiting calls of others. The kernel counts what
comes on a connection; what calls do not account for is too much where it goes on. Pure: the caller has the clock.
"""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

from heatlens_server.transports.grpc.hang_up import Address

ALLOWED_BYTES, ALLOWED_BYTES_S = 24 << 20, 4 << 20
"""What a host may send at once, and a second, that belongs to no call: settings, pings, messages that are not read."""

ALLOWED_CALLS, ALLOWED_CALLS_S = 256, 100
"""How many calls a host may leave as soon as they have begun, at once and a second."""

_STALL_S = 3.0
"""Between two looks: in so long, calls ended unseen as the server was busy, and what came is not held against them."""

_CREDIT_BYTES = 16 << 20
"""What calls of one connection may account for before it is seen to have come: the two are not counted at once."""

_BAN_S, _LONGEST_BAN_S = 5.0, 300.0
"""How long the connections of a host that floods are closed, in seconds: twice as long each time that it goes on."""

_MOST_HOSTS = 4096


@dataclass(frozen=True, slots=True)
class Came:
    """What one connection sent.

    Attributes:
        received_bytes: since it was opened.
        accounted_bytes: what calls accounted for since the look before.
        room_bytes: what its open calls may take that is not accounted for yet.
        left_calls: calls that were left at once since the look before, and health checks as a part of one each.
    """

    received_bytes: int
    accounted_bytes: int = 0
    room_bytes: int = 0
    left_calls: float = 0.0


@dataclass(slots=True)
class _Seen:
    received_bytes: int = 0
    excess_bytes: float = 0.0


@dataclass(slots=True)
class _Ban:
    until_s: float
    next_s: float


class Floods:
    """Remembers the connections of the look before, and the hosts that flooded."""

    def __init__(self, host_of: Callable[[Address], Hashable]) -> None:
        """Nobody has been seen.

        Args:
            host_of: of a connection, what is judged together.
        """
        self._host_of = host_of
        self._seen: dict[Address, _Seen] = {}
        self._left: dict[Hashable, float] = {}
        self._looked_s: float | None = None
        self._bans: dict[Hashable, _Ban] = {}

    def look(self, connections: Mapping[Address, Came], now_s: float) -> tuple[list[Address], list[Address]]:
        """Take note of what came.

        Args:
            connections: all that are open, or had calls since the look before.
            now_s: the time, on any clock.

        Returns:
            Those to close, and one of each host that has begun to flood.
        """
        passed_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        self._looked_s = now_s
        hosts: dict[Hashable, list[Address]] = {}
        for address in connections:
            hosts.setdefault(self._host_of(address), []).append(address)
        self._seen = {address: self._seen.get(address) or _Seen() for address in connections}
        # A host that opens one connection after the other is known by its calls.
        allowed_calls = passed_s * ALLOWED_CALLS_S
        left = {host: calls - allowed_calls for host, calls in self._left.items() if calls > allowed_calls}
        self._left = {host: calls for host, calls in left.items() if host not in hosts}
        if passed_s > _STALL_S:
            for address, came in connections.items():
                self._seen[address] = _Seen(came.received_bytes)
        close, began = [], []
        for host, addresses in hosts.items():
            ban = self._bans.get(host)
            if ban is None or now_s >= ban.until_s:
                left_calls = left.get(host, 0.0)
                if passed_s <= _STALL_S:
                    left_calls += sum(connections[address].left_calls for address in addresses)
                excess_bytes = self._excess_bytes(addresses, connections, passed_s)
                if excess_bytes <= ALLOWED_BYTES and left_calls <= ALLOWED_CALLS:
                    if left_calls:
                        self._left[host] = left_calls
                    continue
                self._ban(host, now_s)
                began.append(addresses[0])
            close += addresses
        return close, began

    def banned(self, now_s: float) -> list[Hashable]:
        """The hosts whose connections are closed."""
        return [host for host, ban in self._bans.items() if now_s < ban.until_s]

    def _excess_bytes(self, addresses: list[Address], connections: Mapping[Address, Came], passed_s: float) -> float:
        """What a host's connections sent beyond what calls account for, or may still."""
        share_s = passed_s / len(addresses)
        excess_bytes = 0.0
        for address in addresses:
            seen, came = self._seen[address], connections[address]
            more_bytes = came.received_bytes - seen.received_bytes - came.accounted_bytes
            seen.received_bytes = came.received_bytes
            seen.excess_bytes = max(seen.excess_bytes + more_bytes, -_CREDIT_BYTES)
            if seen.excess_bytes > 0:
                seen.excess_bytes = max(0.0, seen.excess_bytes - share_s * ALLOWED_BYTES_S)
            excess_bytes += max(0.0, seen.excess_bytes - came.room_bytes)
        return excess_bytes

    def _ban(self, host: Hashable, now_s: float) -> None:
        ban_s = _BAN_S
        if (before := self._bans.pop(host, None)) is not None and now_s < before.until_s + _LONGEST_BAN_S:
            ban_s = before.next_s
        if len(self._bans) >= _MOST_HOSTS:
            del self._bans[next(iter(self._bans))]
        self._bans[host] = _Ban(now_s + ban_s, min(2 * ban_s, _LONGEST_BAN_S))
