"""The order of steps: which entry, of those that take many steps, has its next step.

* Specs take turns, a step each: a job of one step does not wait for another caller's explanation of a thousand.
* Of one spec, a device finishes an entry before it begins another. If they took turns as well, equal entries that came
  together would all end when the last one does, and under load miss their deadlines together, each holding its memory
  meanwhile. One after the other, none ends later, and all but the last end earlier, as with the shortest remaining
  processing time first (Schrage, Operations Research 1968).
* Which entry of a spec begins next goes by turns of sources, as in a batch.
* An entry that is begun keeps its memory on one device, which runs all its steps. So each device has its own order of
  specs, and a few specs are begun on a device at a time: the others keep their turns until one of these has ended.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from heatlens_server.core.engine import MapSpec
from heatlens_server.scheduling.entry import Entry
from heatlens_server.scheduling.fair_queue import FairQueue

_MOST_BEGUN = 8
"""How many specs may have an entry between two of its steps, per device."""


@dataclass(slots=True)
class _Line:
    """The entries of one spec: those between two of their steps, by device, and those that are not begun."""

    begun: dict[int, Entry] = field(default_factory=dict)
    others: FairQueue[Entry] = field(default_factory=FairQueue)

    def __len__(self) -> int:
        return len(self.others) + len(self.begun)


class StepTurns:
    """A queue of entries that take steps. Not thread-safe.

    One entry per device may be out: it is put back, or is done with (`end_step`), before the device gets another one.
    """

    def __init__(self, *, device_count: int) -> None:
        """Make an empty queue for so many devices."""
        # A line may be empty: its turn is kept.
        self._lines: dict[MapSpec, _Line] = {}
        # Of each device: all specs in `_lines`, in turn order.
        self._orders: list[OrderedDict[MapSpec, None]] = [OrderedDict() for _ in range(device_count)]
        self._begun = [0] * device_count
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        """All entries, spec by spec."""
        for line in self._lines.values():
            yield from line.begun.values()
            yield from line.others

    def put(self, owner: object, entry: Entry) -> None:
        """Add an entry that is not begun. `owner`: see `FairQueue.put`."""
        self._line(entry.spec).others.put(owner, entry)
        self._count += 1

    def put_back(self, entry: Entry) -> None:
        """Add an entry that was taken, between two of its steps."""
        assert entry.device is not None
        self._line(entry.spec).begun[entry.device] = entry
        self._count += 1
        self._begun[entry.device] += 1

    def end_step(self, entry: Entry) -> None:
        """The step that was taken has ended, and with it its spec's turn on the entry's device."""
        if entry.spec in self._lines and entry.device is not None:
            self._orders[entry.device].move_to_end(entry.spec)

    def has_step(self, device: int) -> bool:
        """Whether a device could run a step."""
        return any(self._has_step(line, device) for line in self._lines.values())

    def take(self, device: int) -> Entry:
        """Take the entry whose step a device runs next.

        Raises:
            LookupError: there is none.
        """
        spent = []
        for spec in self._orders[device]:
            line = self._lines[spec]
            if not line:
                spent.append(spec)  # it had its turn, and nothing to give
            elif self._has_step(line, device):
                break
        else:
            raise LookupError("no entry waits for a step")
        for other in spent:
            self._forget(other)
        entry = line.begun.pop(device, None)
        if entry is None:
            entry = line.others.take()
        else:
            self._begun[device] -= 1
        self._count -= 1
        self._forget_empty(spec, line, keep_turn=False)
        return entry

    def remove(self, owner: object, entry: Entry, *, keep_turn: bool) -> None:
        """Take an entry out of turn that waits here. `owner` and `keep_turn`: see `FairQueue.remove`."""
        line = self._lines[entry.spec]
        if entry.device is not None and line.begun.get(entry.device) is entry:
            del line.begun[entry.device]
            self._begun[entry.device] -= 1
        else:
            line.others.remove(owner, entry, keep_turn=keep_turn)
        self._count -= 1
        self._forget_empty(entry.spec, line, keep_turn=keep_turn)

    def _line(self, spec: MapSpec) -> _Line:
        line = self._lines.get(spec)
        if line is None:
            line = self._lines[spec] = _Line()
            for order in self._orders:
                order[spec] = None
        return line

    def _has_step(self, line: _Line, device: int) -> bool:
        return device in line.begun or (len(line.others) > 0 and self._begun[device] < _MOST_BEGUN)

    def _forget_empty(self, spec: MapSpec, line: _Line, *, keep_turn: bool) -> None:
        if not self._count:
            self._lines.clear()
            for order in self._orders:
                order.clear()
        elif not line and not keep_turn:
            self._forget(spec)

    def _forget(self, spec: MapSpec) -> None:
        del self._lines[spec]
        for order in self._orders:
            del order[spec]
