"""How many bytes of one kind are in flight: per peer and in all. All of this belongs to the event loop.

Of those that wait for room, whoever's host holds least comes first: so one host's many are no reason to refuse another.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from heatlens_server.core.errors import BytesInFlight
from heatlens_server.core.peers import host_of

_RETRY_S = 0.5
"""When to try again after a refusal, in seconds: most requests are answered within it."""

SLOW_S = 1.0
"""While others wait for room, a message may take so long to come, and an answer to be taken, in seconds."""

_LOOK_S = 0.25
"""How often those that wait for room look for a peer that is too slow, in seconds."""

_LOOKERS, _RARELY = 32, 4
"""Where more of a host wait, each looks so many times less often."""

_ROOM_S = 10.0
"""How long one may wait for room, in seconds."""

_SPARE = 8
"""While a host has all, others have an eighth of it more between them, and each of them an eighth of that."""

_MOST_CUTS = 4096
"""Of how many hosts it is remembered that they were cut off."""


class Held:
    """Bytes that are held of a budget, until `release`. A context manager.

    Attributes:
        peer: the connection whose they are.
        host: its host.
        bytes: how many.
        since: of a message that is not whole yet: since when it is awaited, on the loop's clock, in seconds.
        cut: of such a message: done when others need the room that is kept for it.
    """

    __slots__ = ("_budget", "bytes", "cut", "host", "peer", "since")

    def __init__(self, budget: "ByteBudget", peer: str, host: str) -> None:
        self._budget = budget
        self.peer = peer
        self.host = host
        self.bytes = 0
        self.since: float | None = None
        self.cut: asyncio.Future[None] | None = None

    def keep(self, size_bytes: int) -> None:
        """Hold so much from now on, whatever was held, and whether or not there is room."""
        self._budget.change(self, size_bytes)

    async def room(self, size_bytes: int) -> None:
        """Hold so much, once there is room. Raises: see `ByteBudget.wait`."""
        await self._budget.wait(self, size_bytes)

    def release(self) -> None:
        """Hold nothing any more. Idempotent."""
        self._budget.change(self, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class _Waiting:
    """One that waits for room."""

    held: Held
    size_bytes: int
    ready: "asyncio.Future[None]"


class ByteBudget:
    """Bytes of one kind that are in flight. One that is alone is let in, whatever its size."""

    def __init__(
        self,
        what: str,
        *,
        total_bytes: int,
        peer_bytes: int,
        most_waiting: int = 1024,
        slow_s: float = SLOW_S,
        host_of: Callable[[str], str] = host_of,
        relieve: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is held.

        Args:
            what: what is counted, for messages: "requests".
            total_bytes: most in all.
            peer_bytes: most of one peer.
            most_waiting: most that wait for room: the transport has some of each already.
            slow_s: while others wait for room, how long a message may take to come, in seconds.
            host_of: of a peer, the host that room is shared between, and that comes last once it was cut off.
            relieve: called again and again while some wait for what others hold.
        """
        self._what = what
        self._total_bytes = total_bytes
        self._spare_bytes = total_bytes // _SPARE
        self._peer_bytes = peer_bytes
        self._most_waiting = most_waiting
        self._slow_s = slow_s
        self._host_of = host_of
        self._relieve = relieve
        self._held = 0
        self._of_peers: Counter[str] = Counter()
        # The part of it that is kept for messages which are not whole yet, the one that is awaited longest first.
        self._awaited: dict[Held, None] = {}
        self._awaited_bytes = 0
        self._awaited_of_peers: Counter[str] = Counter()
        self._of_hosts: Counter[str] = Counter()
        # By host, the newest last.
        self._waiting: dict[str, list[_Waiting]] = {}
        self._waiting_count = 0
        self._cut: set[str] = set()
        self._watchers: set[Callable[[], None]] = set()

    @property
    def held_bytes(self) -> int:
        """How much is held now."""
        return self._held

    def hold(self, peer: str) -> Held:
        """Nothing yet, for a peer."""
        return Held(self, peer, self._host_of(peer))

    def is_full(self, peer: str) -> bool:
        """Whether a peer should send no more."""
        return self._held >= self._total_bytes or self._of_peers[peer] >= self._peer_bytes

    @contextmanager
    def watched(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Have something called whenever there is more room."""
        self._watchers.add(watcher)
        try:
            yield
        finally:
            self._watchers.discard(watcher)

    async def await_message(self, peer: str, most_bytes: int) -> Held:
        """Hold room for a message that is to be read: until `Held.keep` tells its size, or `Held.cut` comes.

        Where it is messages being read that take the room, or a host that holds more than this one, they are waited
        for; messages that are slow to come are cut off.

        Raises:
            BytesInFlight: messages that were read leave no room, or there is none for too long.
        """
        held = self.hold(peer)
        whole = self._held - self._awaited_bytes
        whole_of_peer = self._of_peers[peer] - self._awaited_of_peers[peer]
        no_room = whole and whole + most_bytes > self._total_bytes
        has_its_share = self._of_hosts[held.host] + most_bytes >= max(self._of_hosts.values(), default=0)
        if (no_room and has_its_share) or (whole_of_peer and whole_of_peer + most_bytes > self._peer_bytes):
            raise self._refusal(most_bytes)
        await self.wait(held, most_bytes)
        loop = asyncio.get_running_loop()
        held.since, held.cut = loop.time(), loop.create_future()
        self._awaited[held] = None
        self._awaited_bytes += most_bytes
        _add(self._awaited_of_peers, peer, most_bytes)
        return held

    async def wait(self, held: Held, size_bytes: int) -> None:
        """Hold so much, once there is room.

        Raises:
            BytesInFlight: there is none for too long, or too many wait for it.
        """
        if not self._waiting and self._fits(held, size_bytes):
            self.change(held, size_bytes)
            return
        loop = asyncio.get_running_loop()
        one = _Waiting(held, size_bytes, loop.create_future())
        self._waiting.setdefault(held.host, []).append(one)
        self._waiting_count += 1
        if self._waiting_count > self._most_waiting:
            self._drop(self._last())
        self._serve()
        until = loop.time() + _ROOM_S
        try:
            while not one.ready.done():
                # Who looks frees room for all: of a thousand of a host each need not look as often.
                look_s = min(_LOOK_S, self._slow_s) * (_RARELY if len(self._waiting[held.host]) > _LOOKERS else 1)
                await asyncio.wait([one.ready], timeout=max(0.0, min(look_s, until - loop.time())))
                if one.ready.done():
                    break
                self._cut_slowest(held.peer, size_bytes)
                if loop.time() >= until and not one.ready.done():  # the cut may have made room for it
                    self._drop(one)
            one.ready.result()
        except asyncio.CancelledError:
            if not one.ready.done():
                self._drop(one)
            if one.ready.exception() is None:
                held.release()  # it got its room, and its caller has left
            raise

    def change(self, held: Held, size_bytes: int) -> None:
        """Change what one holds; those that wait get what becomes free."""
        if held.since is not None:
            held.since = None
            del self._awaited[held]
            self._awaited_bytes -= held.bytes
            _add(self._awaited_of_peers, held.peer, -held.bytes)
        more = size_bytes - held.bytes
        held.bytes = size_bytes
        self._held += more
        _add(self._of_peers, held.peer, more)
        _add(self._of_hosts, held.host, more)
        if more < 0:
            self._serve()
            for watcher in tuple(self._watchers):
                watcher()

    def _fits(self, held: Held, size_bytes: int) -> bool:
        others, of_peer = self._held - held.bytes, self._of_peers[held.peer] - held.bytes
        total_bytes = self._total_bytes
        if self._of_hosts[held.host] - held.bytes + size_bytes <= self._spare_bytes // _SPARE:
            # Less than what another holds, or there would be room.
            total_bytes += self._spare_bytes
        return (not others or others + size_bytes <= total_bytes) and (
            not of_peer or of_peer + size_bytes <= self._peer_bytes
        )

    def _serve(self) -> None:
        """Give room to those that wait, in order, past those whose peers hold too much.

        Hosts that were cut off come last, and before them the one that holds most. Of one host the newest comes first:
        when more come than can be served, the newest are those whose callers still wait.
        """
        while self._waiting and self._held < self._total_bytes + self._spare_bytes:
            little = self._spare_bytes // _SPARE if self._held >= self._total_bytes else self._total_bytes
            hosts = [host for host in reversed(self._waiting) if self._of_hosts[host] < little]
            hosts.sort(key=lambda host: (host in self._cut, self._of_hosts[host]))
            fitting = (
                one for host in hosts for one in reversed(self._waiting[host]) if self._fits(one.held, one.size_bytes)
            )
            if (one := next(fitting, None)) is None:
                return
            self._leave(one)
            self.change(one.held, one.size_bytes)
            one.ready.set_result(None)

    def _cut_slowest(self, peer: str, size_bytes: int) -> None:
        """Free some of the room that a peer waits for: cut off who takes it longest without need."""
        everybody = self._held + size_bytes > self._total_bytes
        slowest = next((held for held in self._awaited if everybody or held.peer == peer), None)
        if slowest is not None:
            assert slowest.since is not None
            assert slowest.cut is not None
            if asyncio.get_running_loop().time() - slowest.since > self._slow_s:
                if len(self._cut) >= _MOST_CUTS:
                    self._cut.clear()
                self._cut.add(slowest.host)
                if not slowest.cut.done():
                    slowest.cut.set_result(None)
                slowest.release()
        if everybody:
            self._relieve()

    def _last(self) -> _Waiting:
        """The one that waits and is the first to be refused: the oldest of the host of which most wait."""
        return self._waiting[max(self._waiting, key=lambda host: (host in self._cut, len(self._waiting[host])))][0]

    def _leave(self, one: _Waiting) -> None:
        """Let one wait no longer."""
        of_host = self._waiting[one.held.host]
        of_host.remove(one)
        self._waiting_count -= 1
        if not of_host:
            del self._waiting[one.held.host]

    def _drop(self, one: _Waiting) -> None:
        """Refuse one that waits."""
        self._leave(one)
        one.ready.set_exception(self._refusal(one.size_bytes))

    def _refusal(self, size_bytes: int) -> BytesInFlight:
        everybody = self._held + size_bytes > self._total_bytes
        limit_bytes = self._total_bytes if everybody else self._peer_bytes
        return BytesInFlight(
            f"{self._what} in flight {'' if everybody else 'on this connection '}take {limit_bytes} bytes, as many as "
            "they may",
            metadata={"limit_bytes": str(limit_bytes)},
            retry_after_s=_RETRY_S,
        )


def _add(counts: Counter[str], peer: str, more: int) -> None:
    """Count; peers that hold nothing are forgotten."""
    counts[peer] += more
    if not counts[peer]:
        del counts[peer]
