"""Frames and calls without number, from a host of their own."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from heatlens.v1 import explain_pb2 as pb
from messages import distinct, pixels
from raw_http2 import DATA, EXPLAIN, PING, RST_STREAM, SETTINGS, RawConnection, frame, headers, message

KINDS = ("resets", "closes", "checks", "pings", "settings")
"""Whole requests that are reset, or whose connection is closed; whole health checks; frames of PING and of SETTINGS."""

STRANGER = "127.0.0.2"

_HEALTH = "/grpc.health.v1.Health/Check"
END_STREAM = 1
_CANCEL = (8).to_bytes(4, "big")


def calls(first: int, count: int, kind: str) -> bytes:
    """Whole calls with the numbers from `first` on."""
    image = pb.ExplainRequest(image=pixels(distinct(1)[0])).SerializeToString()
    method, request = (_HEALTH, message(b"")) if kind == "checks" else (EXPLAIN, message(image))
    return b"".join(
        headers(number, method)
        + frame(DATA, END_STREAM, number, request)
        + (frame(RST_STREAM, 0, number, _CANCEL) if kind == "resets" else b"")
        for number in range(first, first + 2 * count, 2)
    )


def endless(kind: str) -> Iterator[bytes]:
    """What is sent on a connection, in pieces."""
    first = 1
    while True:
        if kind in ("pings", "settings"):
            yield (frame(PING, 0, 0, bytes(8)) if kind == "pings" else frame(SETTINGS, 0, 0)) * 4000
        else:
            yield calls(first, 200, kind)
            first += 400


def flood(address: str, kind: str, over: threading.Event) -> None:
    """Send, and read the answers, connecting anew where the server hangs up, as gRPC does by itself with some."""
    while not over.is_set():
        with contextlib.suppress(OSError):
            peer = RawConnection(address, source=STRANGER, timeout_s=1)
            threading.Thread(target=drain, args=(peer.socket,), daemon=True).start()
            try:
                peer.send(frame(SETTINGS, 1, 0))
                for piece in endless(kind):
                    if over.is_set():
                        break
                    peer.send(piece)
                    if kind == "closes":
                        break
            finally:
                peer.close()


def drain(connection: socket.socket) -> None:
    """Read until the end."""
    with contextlib.suppress(OSError):
        while connection.recv(1 << 16):
            pass
