"""Entries that take steps: whose step is next.

* Specs take turns, a step each: a job of one step does not wait for somebody's explanation of a thousand.
* Of one spec, an entry is finished before another begins. If they took turns as well, equal ones that came together
  would all end when the last one does, and under load miss their deadlines together, each holding its memory meanwhile.
  One after the other, none ends later, and all but the last end earlier, as with the shortest remaining processing time
  first (Schrage, Operations Research 1968).
* Who of a spec begins next goes by turns of sources, as in a batch.
* What an entry keeps between two steps is not free, so a few specs are begun at a time, and the others keep their turns
  until one of these has nothing begun.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from heatlens_server.core.engine import MapSpec
from heatlens_server.scheduling.entry import Entry
from heatlens_server.scheduling.fair_queue import FairQueue

_MOST_BEGUN = 8
"""How many specs may have an entry between two of its steps."""


@dataclass(slots=True)
class _Line:
    """The entries of one spec: the one between two of its steps, and those that are not begun."""

    begun: Entry | None = None
    others: FairQueue[Entry] = field(default_factory=FairQueue)

    def __len__(self) -> int:
        return len(self.others) + (self.begun is not None)


class StepTurns:
    """A queue of entries that take steps. Not thread-safe.

    One entry at a time may be out: it is put back, or is done with (`end_step`), before another one is taken.
    """

    def __init__(self) -> None:
        # In turn order. A line may be empty: its turn is kept.
        self._lines: OrderedDict[MapSpec, _Line] = OrderedDict()
        self._count = 0
        self._begun = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """All entries, spec by spec."""
        for line in self._lines.values():
            if line.begun is not None:
                yield line.begun
            yield from line.others

    def put(self, owner: object, entry: Entry) -> None:
        """Add an entry that is not begun. `owner`: see `FairQueue.put`."""
        self._lines.setdefault(entry.spec, _Line()).others.put(owner, entry)
        self._count += 1

    def put_back(self, entry: Entry) -> None:
        """Add the entry that was taken, between two of its steps."""
        self._lines.setdefault(entry.spec, _Line()).begun = entry
        self._count += 1
        self._begun += 1

    def end_step(self, spec: MapSpec) -> None:
        """The step that was taken has ended, and with it its spec's turn."""
        if spec in self._lines:
            self._lines.move_to_end(spec)

    def take(self) -> Entry:
        """Take the entry whose step is next.

        Raises:
            LookupError: there is none.
        """
        spent = []
        for spec, line in self._lines.items():
            if not line:  # it had its turn, and nothing to give
                spent.append(spec)
            elif line.begun is not None or self._begun < _MOST_BEGUN:
                break
        else:
            raise LookupError("nobody waits")
        for other in spent:
            del self._lines[other]
        entry = line.begun
        if entry is None:
            entry = line.others.take()
        else:
            line.begun = None
            self._begun -= 1
        self._count -= 1
        if not self._count:
            self._lines.clear()
        elif not line:
            del self._lines[spec]
        return entry

    def remove(self, owner: object, entry: Entry, *, keep_turn: bool) -> None:
        """Take an entry out of turn that waits here. `owner` and `keep_turn`: see `FairQueue.remove`."""
        line = self._lines[entry.spec]
        if line.begun is entry:
            line.begun = None
            self._begun -= 1
        else:
            line.others.remove(owner, entry, keep_turn=keep_turn)
        self._count -= 1
        if not self._count:
            self._lines.clear()
        elif not line and not keep_turn:
            del self._lines[entry.spec]
