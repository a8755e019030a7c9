"""Connections without a call give way to newcomers where nearly all places of connections are taken.

gRPC closes what comes beyond the limit unseen, so that as many idle connections as there may be would keep everybody
else out. Clients connect anew by themselves when they make a call.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection

from heatlens_server.transports.grpc.hang_up import Address, address_of, close_connection, connections_to

_LOOK_S = 0.5
"""How often connections are counted, in seconds."""

_IDLE_S = 2.0
"""How long one is without a call before it gives way, in seconds."""

_FULL, _ROOMY = 7 / 8, 3 / 4
"""From which share of the places on connections give way, and how many are taken then."""


async def free_places(port: int, *, max_connections: int, busy: Callable[[], Collection[str]]) -> None:
    """Hang up on idle connections while nearly all places are taken, until it is cancelled.

    Those of the host that has most come first, the one that is idle longest of them.

    Args:
        port: of the server.
        max_connections: the places.
        busy: the peers that have a call now, as gRPC names them.
    """
    idle_since: dict[Address, float] = {}
    while True:
        await asyncio.sleep(_LOOK_S)
        found = await asyncio.to_thread(connections_to, port)
        now, calling = time.monotonic(), {address_of(peer) for peer in busy()}
        idle_since = {one: idle_since.get(one, now) for one in found if one not in calling}
        if len(found) < _FULL * max_connections:
            continue
        hosts = Counter(host for host, _ in found)
        waiting = sorted((one for one in idle_since if now - idle_since[one] >= _IDLE_S), key=idle_since.__getitem__)
        for _ in range(len(found) - int(_ROOMY * max_connections)):
            if not waiting:
                break
            one = max(waiting, key=lambda address: hosts[address[0]])
            waiting.remove(one)
            hosts[one[0]] -= 1
            await asyncio.to_thread(close_connection, one)
