"""HTTP/2 by hand over one socket: a peer that keeps to no limit and reads only what it wants. RFC 9113 and RFC 7541."""

import socket
from collections import Counter

EXPLAIN = "/heatlens.v1.ExplainService/Explain"

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1

_INITIAL_WINDOW_SIZE = 4  # of SETTINGS, RFC 9113 section 6.5.2
_MAX_FRAME_BYTES = 16_384

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


def message(data: bytes) -> bytes:
    """A message as a call's data: RFC 9113 knows none of it, gRPC's PROTOCOL-HTTP2.md does."""
    return b"\0" + len(data).to_bytes(4, "big") + data


def end_stream(stream_id: int) -> bytes:
    """The end of what a call sends."""
    return frame(DATA, _END_STREAM, stream_id)


def _literal(name: str, value: str) -> bytes:
    return b"\0" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    assert len(text) < 127  # one byte tells the length
    # Half a surrogate pair stands for a byte that is no UTF-8.
    return bytes([len(text)]) + text.encode("utf-8", "surrogateescape")


class RawConnection:
    """A connection that has told the server its settings, and confirms the server's in `upload` alone."""

    def __init__(self, address: str, *, window_bytes: int = 65_535, timeout_s: float = 20.0, source: str = "") -> None:
        """Connect.

        Args:
            address: "host:port".
            window_bytes: how many bytes of each answer the server may send unasked.
            timeout_s: longest wait for the server to read or say something.
            source: the address of this end, "127.0.0.2" for a host of its own; empty: that of everybody.
        """
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection(
            (host, int(port)), timeout=timeout_s, source_address=(source, 0) if source else None
        )
        setting = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + window_bytes.to_bytes(4, "big")
        self.socket.sendall(_PREFACE + frame(SETTINGS, 0, 0, setting))
        self._rest = b""
        # What the server lets this end send: on the connection, by default of a call, and beyond that of each.
        self._room = self._initial = 65_535
        self._extra: Counter[int] = Counter()

    def send(self, *frames: bytes) -> None:
        """Send frames as they are."""
        self.socket.sendall(b"".join(frames))

    def frames(self) -> list[tuple[int, int, bytes]]:
        """Whole frames (kind, stream id, payload) of what the server says next; none once it has hung up."""
        found: list[tuple[int, int, bytes]] = []
        while not found:
            data = self.socket.recv(1 << 20)
            if not data:
                break
            self._rest += data
            while len(self._rest) >= 9:
                length = int.from_bytes(self._rest[:3], "big")
                if len(self._rest) < 9 + length:
                    break
                found.append((self._rest[3], int.from_bytes(self._rest[5:9], "big"), self._rest[9 : 9 + length]))
                self._rest = self._rest[9 + length :]
        return found

    def upload(self, stream_id: int, data: bytes, *, patience_s: float = 1.0) -> bool:
        """Send data of a call as far as the server lets it.

        Returns:
            Whether all was sent: False once the server has ended the call, has hung up, or has granted nothing for
            `patience_s`.
        """
        sent = 0
        self.socket.settimeout(patience_s)
        while sent < len(data):
            size = min(self._room, self._initial + self._extra[stream_id], _MAX_FRAME_BYTES, len(data) - sent)
            if size > 0:
                try:
                    self.send(frame(DATA, 0, stream_id, data[sent : sent + size]))
                except ConnectionError:
                    return False
                sent += size
                self._room -= size
                self._extra[stream_id] -= size
                continue
            try:
                found = self.frames()
            except TimeoutError:
                return False
            if not found or any(kind == RST_STREAM and of == stream_id for kind, of, _ in found):
                return False
            for kind, of, payload in found:
                self._grant(kind, of, payload)
        return True

    def _grant(self, kind: int, stream_id: int, payload: bytes) -> None:
        """Take note of what the server lets this end send; confirm its settings and pings, as honest peers do."""
        if kind == WINDOW_UPDATE and stream_id:
            self._extra[stream_id] += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE:
            self._room += int.from_bytes(payload, "big")
        elif kind == SETTINGS and payload:
            self.send(frame(SETTINGS, _ACK, 0))
            for start in range(0, len(payload), 6):
                if int.from_bytes(payload[start : start + 2], "big") == _INITIAL_WINDOW_SIZE:
                    self._initial = int.from_bytes(payload[start + 2 : start + 6], "big")
        elif kind == PING:
            self.send(frame(PING, _ACK, 0, payload))

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
