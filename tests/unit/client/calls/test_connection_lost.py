"""Connections that break after an answer has begun, where gRPC itself does not call again."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest

import heatlens
from heatlens import Retry
from raw_http2 import HEADERS

_RESET = struct.pack("ii", 1, 0)


class Cutter:
    """A server that passes on what another says, and breaks its first connections once an answer begins."""

    def __init__(self, address: str, breaks: int) -> None:
        self._target = address.rpartition(":")
        self._breaks = breaks
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        hang_up(self._listening)
        self._accepting.join(10)
        for one in self._sockets:
            hang_up(one)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            self._sockets.append(near)
            far = socket.create_connection((self._target[0], int(self._target[2])))
            self._sockets.append(far)
            threading.Thread(target=pump, args=(near, far), daemon=True).start()
            threading.Thread(target=pump, args=(far, near, self._breaks > 0), daemon=True).start()
            self._breaks -= 1


def hang_up(one: socket.socket) -> None:
    """Hang up at once, as the kernel does for a process that is killed."""
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def pump(source: socket.socket, sink: socket.socket, breaks: bool = False) -> None:
    """Pass bytes on; where `breaks`, whole frames, until the headers of an answer were passed on."""
    data = b""
    with suppress(OSError):
        while received := source.recv(65_536):
            data += received
            while data:
                size = 9 + int.from_bytes(data[:3], "big") if breaks else len(data)
                if len(data) < size:
                    break
                sink.sendall(data[:size])
                if breaks and data[3] == HEADERS:
                    hang_up(sink)
                data = data[size:]
    hang_up(sink)
    hang_up(source)


@pytest.fixture
def cutter(peer) -> Iterator[list[Cutter]]:
    made: list[Cutter] = []
    yield made
    for one in made:
        one.close()


async def test_an_answer_that_breaks_off_is_asked_for_again(connect, peer, pixels, cutter):
    cutter.append(Cutter(peer.address, breaks=2))
    result = await connect(cutter[0].address).explain(pixels)
    assert result.explanations
    assert len(peer.requests) == 3


@pytest.mark.parametrize("call", ["explain", "load_model"])
async def test_without_retries_and_of_what_changes_the_server_the_break_is_told(connect, peer, pixels, cutter, call):
    cutter.append(Cutter(peer.address, breaks=9))
    retry = Retry(max_attempts=1) if call == "explain" else Retry()
    client = connect(cutter[0].address, retry=retry)
    with pytest.raises(heatlens.UnavailableError) as caught:
        await (client.explain(pixels) if call == "explain" else client.load_model("tiny"))
    assert caught.value.reason == "CONNECTION_LOST"
    assert len(peer.requests) == 1
