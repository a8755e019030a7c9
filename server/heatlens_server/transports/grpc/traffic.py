"""What calls account for of what each connection sends: the rest is frames without number, or calls that are reset.

Belongs to the event loop. Peers are as gRPC names them.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

CALL_BYTES = 1024
"""What a call takes beside its messages: headers, the frames of its answer's flow control."""

UNREAD_BYTES = 256 * 1024
"""What a peer may send of a message that is not read: gRPC's window."""

QUICK_S = 0.5
"""A call that its peer leaves sooner was not made to be answered,"""

DEADLINE_S = 0.1
"""unless so much or less of its time was left: both ends look at the same deadline."""

CHECK = 0.2
"""What a health check counts of a call that is left: 500 a second are let pass."""


class OpenCall:
    """A call that is being handled.

    Attributes:
        peer: whose it is.
        is_stream: whether messages may come as long as it is open.
        awaits: whether the message of another call may be coming: there is room for it.
        has_message: whether one came, or the end of what its peer sends.
        is_at_fault: whether it is refused for what it asks, not for lack of room.
    """

    __slots__ = ("_traffic", "awaits", "has_message", "is_at_fault", "is_stream", "peer")

    def __init__(self, traffic: "Traffic", peer: str, *, is_stream: bool) -> None:
        self._traffic = traffic
        self.peer = peer
        self.is_stream = is_stream
        self.awaits = False
        self.has_message = False
        self.is_at_fault = False

    def read(self, size_bytes: int) -> None:
        """A message came."""
        self.awaits, self.has_message = False, True
        self._traffic.account(self.peer, size_bytes)

    def leave(self) -> None:
        """Count it as one that was left at once."""
        self._traffic.leave(self.peer)


class Traffic:
    """The calls of all connections, and the bytes that they account for."""

    def __init__(self, max_message_bytes: int, now: Callable[[], float] = time.monotonic) -> None:
        """Nothing has come.

        Args:
            max_message_bytes: of the largest message.
            now: a clock, in seconds.
        """
        self._max_message_bytes = max_message_bytes
        self._now = now
        self._open: dict[OpenCall, None] = {}
        self._accounted: Counter[str] = Counter()
        self._left: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def call(
        self,
        peer: str,
        *,
        is_stream: bool = False,
        is_check: bool = False,
        remaining: Callable[[], float | None] = lambda: None,
    ) -> Iterator[OpenCall]:
        """While a call is handled. Its peer left it if it ends by CancelledError before its deadline.

        Args:
            peer: whose call it is.
            is_stream: see `OpenCall`.
            is_check: whether it is a health check, or watches health: nobody needs many, whether or not they leave.
            remaining: the time until its deadline, in seconds; None: it has none.
        """
        one = OpenCall(self, peer, is_stream=is_stream)
        since_s = self._now()
        self._open[one] = None
        if is_check:
            self._left[peer] += CHECK
        try:
            yield one
        except asyncio.CancelledError:
            remaining_s = remaining()
            in_time = remaining_s is None or remaining_s > DEADLINE_S
            if self._now() - since_s < QUICK_S and in_time and not is_check:
                self.leave(peer)
            self.account(peer, self._room(one))
            raise
        except BaseException:
            # A stream that is refused is not read.
            self.account(peer, UNREAD_BYTES if one.is_stream and not one.has_message else self._room(one))
            raise
        finally:
            self.account(peer, CALL_BYTES)
            del self._open[one]

    def leave(self, peer: str) -> None:
        """A peer left a call at once."""
        self._left[peer] += 1

    def account(self, peer: str, size_bytes: int) -> None:
        """So many bytes of a peer belong to calls."""
        self._accounted[peer] += size_bytes

    @property
    def busy(self) -> set[str]:
        """The peers with a stream, or with a call whose message came, that is not refused for what it asks."""
        return {one.peer for one in self._open if (one.is_stream or one.has_message) and not one.is_at_fault}

    def room(self) -> Counter[str]:
        """How many bytes peers may send at any time, by the calls that are open."""
        room: Counter[str] = Counter()
        for one in self._open:
            room[one.peer] += self._room(one)
        return room

    def accounted_since(self) -> Counter[str]:
        """What calls accounted for since `take`, in bytes."""
        return self._accounted

    def take(self) -> tuple[Counter[str], Mapping[str, float]]:
        """What calls accounted for since this was asked last, in bytes, and how many calls their peers left at once."""
        accounted, self._accounted = self._accounted, Counter()
        left, self._left = self._left, defaultdict(float)
        return accounted, left

    def _room(self, one: OpenCall) -> int:
        if (one.is_stream or one.awaits) and not one.is_at_fault:
            return self._max_message_bytes
        return 0 if one.has_message and not one.is_stream else UNREAD_BYTES
