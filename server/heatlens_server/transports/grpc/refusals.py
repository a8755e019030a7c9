"""How fast the calls of a host are refused for what they ask.

Such a call takes no place in any queue, so that its caller may make the next at once: gRPC hands over some thousands of
calls a second in all, and those of others wait behind them. Belongs to the event loop.
"""

import asyncio
import time
from collections.abc import Callable

from heatlens_server.core.peers import host_of

_A_SECOND, _AT_ONCE = 200, 400

_MOST_WAITING = 1024
"""Of all hosts. Further ones count as calls that are left at once: see `Floods`."""
_MOST_HOSTS = 4096


class Refusals:
    """When the refusals of each host are sent: some at once, and so many a second from then on."""

    def __init__(self, host_of: Callable[[str], str] = host_of, now: Callable[[], float] = time.monotonic) -> None:
        """Nobody was refused.

        Args:
            host_of: the host of a peer.
            now: a clock, in seconds.
        """
        self._host_of = host_of
        self._now = now
        # By host, the one that was refused last last: when its refusals so far would have been sent one by one.
        self._sent_s: dict[str, float] = {}
        self._waiting = 0

    def delay_s(self, peer: str) -> float:
        """After how many seconds the next refusal of a peer is sent. Counts it."""
        host, now_s = self._host_of(peer), self._now()
        sent_s = max(self._sent_s.pop(host, 0.0), now_s - _AT_ONCE / _A_SECOND) + 1 / _A_SECOND
        if len(self._sent_s) >= _MOST_HOSTS:
            del self._sent_s[next(iter(self._sent_s))]
        self._sent_s[host] = sent_s
        return max(0.0, sent_s - now_s)

    async def wait(self, peer: str) -> bool:
        """Return when the refusal of a peer may be sent; False, at once, where too many wait already."""
        if self._waiting >= _MOST_WAITING:
            return False
        delay_s = self.delay_s(peer)
        self._waiting += 1
        try:
            await asyncio.sleep(delay_s)
        finally:
            self._waiting -= 1
        return True
