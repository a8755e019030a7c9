"""A DNS server on this machine: every name has the same IPv4 addresses, which a test changes while it runs."""

import contextlib
import socket
import threading
from collections.abc import Iterator

_IPV4 = 1


class Names:
    """Answers by UDP until it is closed.

    Attributes:
        addresses: what names stand for from now on.
    """

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="names", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    def close(self) -> None:
        """Answer nobody any more."""
        self._socket.sendto(b"", self._socket.getsockname())
        self._thread.join(20)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, peer = self._socket.recvfrom(4096)
            if not query:
                return
            self._socket.sendto(self._answer(query), peer)

    def _answer(self, query: bytes) -> bytes:
        """The question, and an address for each: RFC 1035, 4.1."""
        question = query[12 : query.index(b"\0", 12) + 5]
        found = self.addresses if int.from_bytes(question[-4:-2]) == _IPV4 else ()
        counts = (1).to_bytes(2) + len(found).to_bytes(2) + bytes(4)
        # The question's name, IPv4, the Internet, for 0 seconds, four bytes.
        records = b"".join(b"\xc0\x0c\0\1\0\1" + bytes(4) + b"\0\4" + socket.inet_aton(one) for one in found)
        return query[:2] + b"\x81\x80" + counts + question + records


@contextlib.contextmanager
def names(*addresses: str) -> Iterator[Names]:
    """Names that stand for these addresses."""
    made = Names(*addresses)
    try:
        yield made
    finally:
        made.close()
