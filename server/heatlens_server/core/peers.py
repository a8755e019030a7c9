"""Who a caller is, by its address, and which of the places that callers hold are given to others.

Where all places are taken, a newcomer gets that of whoever holds most, the newest of them, as long as it holds fewer
itself: the longest queue is dropped from (Suter, Lakshman, Stiliadis and Choudhury, INFOCOM 1998). So the places of one
who is alone are never cut, and no number of calls of one keeps the others out.
"""

import functools
import ipaddress
from collections.abc import Callable, Iterable
from typing import TypeVar
from urllib.parse import unquote

T = TypeVar("T")


@functools.lru_cache(4096)
def host_of(peer: str) -> str:
    """The host of a connection: of IPv6 its network of 64 bits, all of which is usually one caller's.

    Args:
        peer: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234"; anything else is a host by itself.
    """
    kind, _, rest = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return peer
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def gives_way(held: Iterable[tuple[str, T]], peer: str, host_of: Callable[[str], str]) -> T | None:
    """Whose place a newcomer gets where all are taken; None if no host holds more than its own would then.

    Args:
        held: the connections of those that hold places, and these; the newest last.
        peer: the newcomer's connection.
        host_of: the host of a connection.
    """
    hosts: dict[str, list[T]] = {}
    for connection, item in held:
        hosts.setdefault(host_of(connection), []).append(item)
    most = max(hosts.values(), key=len, default=[])
    return most[-1] if len(most) > len(hosts.get(host_of(peer), ())) + 1 else None
