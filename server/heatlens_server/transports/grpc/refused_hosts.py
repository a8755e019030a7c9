"""Hosts that cannot connect for a while: the kernel drops what they send to the port, and gRPC never hears of it.

gRPC's core accepts every connection. One that is closed as soon as it is seen has sent thousands of frames by then. A
filter of the listening socket needs no privileges, and what it drops costs next to nothing. Classic BPF:
https://www.kernel.org/doc/html/latest/networking/filter.html. Linux only; elsewhere nothing is refused.
"""

import contextlib
import ctypes
import ipaddress
import socket
import struct
import sys
from collections.abc import Iterable

from heatlens_server.transports.grpc.hang_up import sockets

_ATTACH, _DETACH = 26, 27
"""SO_ATTACH_FILTER and SO_DETACH_FILTER of asm-generic/socket.h."""

_NETWORK = 0xFFF00000
"""SKF_NET_OFF of linux/filter.h: offsets from there are in the packet's IP header."""

_LOAD_WORD, _LOAD_BYTE, _SHIFT_RIGHT, _JUMP, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x30, 0x74, 0x05, 0x15, 0x06

_ALL = 0xFFFFFFFF

_MOST_HOSTS = 800
"""A filter has 4,096 instructions at most."""

Instruction = tuple[int, int, int, int]
"""Its code, how many instructions to skip if it holds and if it does not, and its number."""


def refuse_hosts(port: int, hosts: Iterable[str]) -> None:
    """Let some hosts, and no others, send nothing to a port of this process from now on.

    Args:
        port: that it listens on.
        hosts: addresses of IPv4, and networks of IPv6 of 64 bits; others are passed over.
    """
    if not sys.platform.startswith("linux"):
        return
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _program(hosts))
    buffer = ctypes.create_string_buffer(program)
    for one in sockets():
        with contextlib.suppress(OSError):
            if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) or one.getsockname()[1] != port:
                continue
            if program:
                filter_ = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
                one.setsockopt(socket.SOL_SOCKET, _ATTACH, filter_)
            else:
                one.setsockopt(socket.SOL_SOCKET, _DETACH, 0)


def _program(hosts: Iterable[str]) -> list[Instruction]:
    """The filter: no instructions if there is nobody to refuse."""
    old: list[Instruction] = []
    new: list[Instruction] = []
    for host in list(hosts)[-_MOST_HOSTS:]:
        with contextlib.suppress(ValueError):
            network = ipaddress.ip_network(host)
            address = int(network.network_address)
            if network.version == 4:
                old += [(_JUMP_IF_EQUAL, 0, 1, address), (_RETURN, 0, 0, 0)]
            else:
                new += [
                    (_LOAD_WORD, 0, 0, _NETWORK + 8),
                    (_JUMP_IF_EQUAL, 0, 3, address >> 96),
                    (_LOAD_WORD, 0, 0, _NETWORK + 12),
                    (_JUMP_IF_EQUAL, 0, 1, address >> 64 & _ALL),
                    (_RETURN, 0, 0, 0),
                ]
    if not old and not new:
        return []
    passed = [(_RETURN, 0, 0, _ALL)]
    version_4 = [(_LOAD_WORD, 0, 0, _NETWORK + 12), *old, *passed]
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 1, 0, 4),
        (_JUMP, 0, 0, len(version_4)),
        *version_4,
        *new,
        *passed,
    ]
