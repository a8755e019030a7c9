"""Items of many owners that cost differently: those of one cost are a class, and classes have equal shares of the work.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) between classes: one gets a start tag, the larger of the
virtual time and its last finish tag, and the smallest goes first. So however many dear items wait, a cheaper one that
comes waits for about its own cost times the number of classes, and dear ones are not starved by cheap ones either.
"""

import math
from collections.abc import Hashable
from typing import Generic, TypeVar

from heatlens_server.scheduling.fair_queue import FairQueue

T = TypeVar("T")


class CostQueue(Generic[T]):
    """A queue of classes, a power of two of cost each, in which owners take turns. Not thread-safe."""

    def __init__(self) -> None:
        self._classes: dict[int, FairQueue[T]] = {}
        self._tags: dict[int, float] = {}
        self._now = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def put(self, owner: Hashable, item: T, *, cost: float = 0.0) -> None:
        """Add an item at the end of its owner's line, in the class of its cost."""
        number = _class_of(cost)
        if number not in self._classes:
            self._classes[number] = FairQueue()
            self._tags[number] = max(self._now, self._tags.get(number, 0.0))
        self._classes[number].put(owner, item)

    def take(self) -> T:
        """Take out the next item.

        Raises:
            LookupError: there is none.
        """
        if not self._classes:
            raise LookupError("no item waits")
        number = min(self._classes, key=lambda one: (self._tags[one], one))
        self._now = self._tags[number]
        self._tags[number] += 2.0**number
        item = self._classes[number].take()
        self._forget_empty(number)
        return item

    def remove(self, owner: Hashable, item: T, *, cost: float = 0.0, keep_turn: bool) -> bool:
        """Take out an item out of turn: as `FairQueue.remove`, with the cost that it was put with."""
        number = _class_of(cost)
        removed = number in self._classes and self._classes[number].remove(owner, item, keep_turn=keep_turn)
        self._forget_empty(number)
        return removed

    def _forget_empty(self, number: int) -> None:
        if not self._classes.get(number, True):
            del self._classes[number]
        if not self._classes:
            self._tags.clear()
            self._now = 0.0


def _class_of(cost: float) -> int:
    return math.frexp(cost)[1]
