"""Closing the connection of a peer that does not take its answers: gRPC's Python API ends no single call by force."""

import contextlib
import os
import re
import socket
from pathlib import Path
from urllib.parse import unquote

_PEER = re.compile(r"ipv[46]:\[?([^\]]+?)\]?:(\d+)")

_DESCRIPTORS = Path("/proc/self/fd")


def hang_up(peer: str) -> bool:
    """Close a peer's connection for both sides; gRPC then cancels its calls and frees what they hold.

    Args:
        peer: as gRPC names it: "ipv4:127.0.0.1:1234", "ipv6:%5B::1%5D:1234".

    Returns:
        False if there is no such connection, as for peers on a unix socket, or the system does not list its files.
    """
    named = _PEER.fullmatch(unquote(peer))
    if named is None or not _DESCRIPTORS.is_dir():
        return False
    address = (named[1].partition("%")[0], int(named[2]))
    for descriptor in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            if not str(descriptor.readlink()).startswith("socket:"):
                continue
            # A copy of the descriptor: it stays that file's, whatever becomes of the number meanwhile.
            with socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                if _address(copy) == address:
                    copy.shutdown(socket.SHUT_RDWR)
                    return True
    return False


def _address(connection: socket.socket) -> tuple[str, int]:
    """Whom a connection is with. Raises OSError if it is none, or none of IP."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        raise OSError("no connection of IP")
    host, port = connection.getpeername()[:2]
    # gRPC listens for both families by one socket, and names peers by their own.
    return str(host).removeprefix("::ffff:"), int(port)
