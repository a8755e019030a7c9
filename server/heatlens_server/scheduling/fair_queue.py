"""Items of many owners, handed out in turns.

Fair queueing: a scheduler gives each of the flows that wait the same service, however much each of them queues. With
start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) each item gets a start tag, the larger of the virtual time
and the finish tag of its owner's item before it, and the smallest tag goes first. Our items cost the same, so that
finish tag = start tag + 1, and then neither tags nor a clock are needed: the order is that of a ring of owners, of whom
each gives one item per round (Nagle, RFC 970, 1985). One thing differs: an owner that was idle joins at the end of the
round, as with self-clocked fair queueing (Golestani, INFOCOM 1994), and not in the midst of it. Otherwise newcomers,
which never wait twice, could hold a round for ever.
"""

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A queue in which every owner has a line, and owners take turns. Not thread-safe.

    Between any two moments, two owners that wait all the while are served equally often, give or take one. Being idle
    earns nothing and being served while no other owner waits costs nothing.
    """

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        """All items, owner by owner."""
        return (item for line in self._lines.values() for item in line)

    def put(self, owner: Hashable, item: T) -> None:
        """Add an item at the end of its owner's line."""
        self._lines.setdefault(owner, deque()).append(item)
        self._count += 1

    def take(self) -> T:
        """Take out the next item.

        Raises:
            LookupError: there is none.
        """
        spent = []
        for owner, line in self._lines.items():
            if line:
                break
            spent.append(owner)  # it had its turn, and nothing to give
        else:
            raise LookupError("no item waits")
        for other in spent:
            del self._lines[other]
        item = line.popleft()
        self._count -= 1
        if line:
            self._lines.move_to_end(owner)
        else:
            del self._lines[owner]
        return item

    def remove(self, owner: Hashable, item: T, *, keep_turn: bool) -> bool:
        """Take out an item out of turn.

        Args:
            owner: the item's owner.
            item: what to take out.
            keep_turn: keep the owner's place in the round even if its line is empty now: an owner that replaces
                its only item by a newer one would otherwise start again at the end each time. False for owners
                that do not come back.

        Returns:
            False if the item is not there.
        """
        line = self._lines.get(owner)
        if line is None or item not in line:
            return False
        line.remove(item)
        self._count -= 1
        if not self._count:
            self._lines.clear()
        elif not line and not keep_turn:
            del self._lines[owner]
        return True
