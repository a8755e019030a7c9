"""Closing the connection of a peer that does not take its answers: gRPC's Python API ends no single call by force."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

_PEER = re.compile(r"ipv[46]:\[?([^\]]+?)\]?:(\d+)")

_DESCRIPTORS = Path("/proc/self/fd")

Address = tuple[str, int]
"""Of the other end: its host and port."""


def hang_up(peer: str) -> bool:
    """Close a peer's connection for both sides; gRPC then cancels its calls and frees what they hold.

    Args:
        peer: as gRPC names it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234".

    Returns:
        False if there is no such connection, as for peers on a unix socket, or the system does not list its files.
    """
    address = address_of(peer)
    return address is not None and close_connection(address)


def address_of(peer: str) -> Address | None:
    """The address and port of a peer; None of one on a unix socket."""
    named = _PEER.fullmatch(unquote(peer))
    return None if named is None else (named[1].partition("%")[0], int(named[2]))


def close_connection(address: Address) -> bool:
    """Close the connection with an address and port; False if there is none."""
    for connection in _connections():
        if _address(connection) == address:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                return True
    return False


def connections_to(port: int) -> set[Address]:
    """With whom there are connections to a port of this process."""
    found = set()
    for connection in _connections():
        with contextlib.suppress(OSError):
            if connection.getsockname()[1] == port:
                found.add(_address(connection))
    return found


def _connections() -> Iterator[socket.socket]:
    """The process's connections of IP, each as a copy of its descriptor that lives until the next is asked for."""
    if not _DESCRIPTORS.is_dir():
        return
    for descriptor in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            # A copy of the descriptor: it stays that file's, whatever becomes of the number meanwhile.
            with socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                _address(copy)
                yield copy


def _address(connection: socket.socket) -> Address:
    """Whom a connection is with. Raises OSError if it is none, or none of IP."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        raise OSError("no connection of IP")
    host, port = connection.getpeername()[:2]
    # gRPC listens for both families by one socket, and names peers by their own.
    return str(host).removeprefix("::ffff:"), int(port)
