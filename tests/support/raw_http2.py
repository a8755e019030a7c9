"""HTTP/2 by hand over one socket: a peer that keeps to no limit and reads only what it wants. RFC 9113 and RFC 7541."""

import socket
from collections import Counter

EXPLAIN = "/heatlens.v1.ExplainService/Explain"

DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def headers(stream_id: int, method: str = EXPLAIN, **metadata: str) -> bytes:
    """What begins a gRPC call, as literals that no table holds. Names with underscores are sent with hyphens."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "test",
        "te": "trailers",
        "content-type": "application/grpc",
        **{name.replace("_", "-"): value for name, value in metadata.items()},
    }
    return frame(HEADERS, _END_HEADERS, stream_id, b"".join(_literal(*field) for field in fields.items()))


def message_start(stream_id: int, length: int) -> bytes:
    """The first five bytes of a message of so many bytes."""
    return frame(DATA, 0, stream_id, b"\0" + length.to_bytes(4, "big"))


def end_stream(stream_id: int) -> bytes:
    """The end of what a call sends."""
    return frame(DATA, _END_STREAM, stream_id)


def _literal(name: str, value: str) -> bytes:
    return b"\0" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    assert len(text) < 127  # one byte tells the length
    return bytes([len(text)]) + text.encode()


class RawConnection:
    """A connection that has told the server its settings, and confirms none of the server's."""

    def __init__(self, address: str, *, window_bytes: int = 65_535, timeout_s: float = 20.0) -> None:
        """Connect.

        Args:
            address: "host:port".
            window_bytes: how many bytes of each answer the server may send unasked.
            timeout_s: longest wait for the server to read or say something.
        """
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=timeout_s)
        # SETTINGS_INITIAL_WINDOW_SIZE, RFC 9113 section 6.5.2.
        self.socket.sendall(_PREFACE + frame(SETTINGS, 0, 0, (4).to_bytes(2, "big") + window_bytes.to_bytes(4, "big")))
        self._rest = b""

    def send(self, *frames: bytes) -> None:
        """Send frames as they are."""
        self.socket.sendall(b"".join(frames))

    def frames(self) -> list[tuple[int, int, bytes]]:
        """Whole frames (kind, stream id, payload) of what the server says next; none once it has hung up."""
        self._rest += self.socket.recv(1 << 20)
        found = []
        while len(self._rest) >= 9:
            length = int.from_bytes(self._rest[:3], "big")
            if len(self._rest) < 9 + length:
                break
            found.append((self._rest[3], int.from_bytes(self._rest[5:9], "big"), self._rest[9 : 9 + length]))
            self._rest = self._rest[9 + length :]
        return found

    def until(self, kind: int, count: int) -> Counter[int]:
        """Read until so many frames of a kind have come; how many of each kind came."""
        seen: Counter[int] = Counter()
        while seen[kind] < count:
            found = self.frames()
            assert found, (seen, "the server hung up")
            seen.update(one for one, _, _ in found)
        return seen

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
