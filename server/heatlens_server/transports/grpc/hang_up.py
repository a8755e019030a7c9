"""Closing connections by force, as gRPC's Python API cannot: of peers that take no answers, are idle, or flood."""

import contextlib
import errno
import os
import re
import socket
import struct
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import unquote

_PEER = re.compile(r"ipv[46]:\[?([^\]]+?)\]?:(\d+)")

_DESCRIPTORS = Path("/proc/self/fd")

_RECEIVED_BYTES_END = 136

_AT_ONCE = struct.pack("ii", 1, 0)

Address = tuple[str, int]
"""Of the other end: its host and port."""


def hang_up(peer: str) -> bool:
    """Close a peer's connection for both sides; gRPC then cancels its calls and frees what they hold.

    Args:
        peer: as gRPC names it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234".

    Returns:
        False if there is no such connection, as for peers on a unix socket, the system does not list its files,
            or none is left.
    """
    address = address_of(peer)
    try:
        return address is not None and close_connections({address}) > 0
    except OSError:
        return False


def address_of(peer: str) -> Address | None:
    """The address and port of a peer; None of one on a unix socket."""
    named = _PEER.fullmatch(unquote(peer))
    return None if named is None else (named[1].partition("%")[0], int(named[2]))


def close_connections(addresses: Collection[Address]) -> int:
    """Close the connections with some addresses and ports; returns how many were open.

    Raises: see `sockets`.
    """
    closed = 0
    for connection in _connections():
        if _address(connection) in addresses:
            with contextlib.suppress(OSError):
                # What its peer has sent meanwhile is not waited for.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                connection.shutdown(socket.SHUT_RDWR)
                closed += 1
    return closed


def connections_to(port: int) -> dict[Address, int]:
    """With whom there are connections to a port of this process, and how many bytes came on each; 0 if unknown.

    Raises: see `sockets`.
    """
    found = {}
    for connection in _connections():
        with contextlib.suppress(OSError):
            if connection.getsockname()[1] == port:
                found[_address(connection)] = _received_bytes(connection)
    return found


def _received_bytes(connection: socket.socket) -> int:
    """What came on a connection: tcpi_bytes_received of Linux' struct tcp_info (linux/tcp.h)."""
    if not hasattr(socket, "TCP_INFO"):
        return 0
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _RECEIVED_BYTES_END)
    if len(info) < _RECEIVED_BYTES_END:
        return 0
    return int.from_bytes(info[_RECEIVED_BYTES_END - 8 :], sys.byteorder)


def _connections() -> Iterator[socket.socket]:
    """The process's connections of IP, as copies that live until the next is asked for."""
    for copy in sockets():
        with contextlib.suppress(OSError):
            _address(copy)
            yield copy


def sockets() -> Iterator[socket.socket]:
    """The process's sockets, each as a copy of its descriptor that lives until the next is asked for.

    Raises OSError where no file is left: none is passed over.
    """
    if not _DESCRIPTORS.is_dir():
        return
    for descriptor in _DESCRIPTORS.iterdir():
        try:
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            # A copy of the descriptor: it stays that file's, whatever becomes of the number meanwhile.
            with socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                yield copy
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise


def _address(connection: socket.socket) -> Address:
    """Whom a connection is with. Raises OSError if it is none, or none of IP."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        raise OSError("no connection of IP")
    host, port = connection.getpeername()[:2]
    # gRPC listens for both families by one socket, and names peers by their own.
    return str(host).removeprefix("::ffff:"), int(port)
