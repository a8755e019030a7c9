"""Counts of what streams take and give back: whatever ends a stream, the two must become equal."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Counter:
    """How many of a kind were made, and how many are gone again."""

    created: int = 0
    released: int = 0

    @property
    def open(self) -> int:
        """How many there are now."""
        return self.created - self.released


@dataclass(frozen=True, slots=True)
class StreamCounters:
    """Of all streams of a server since its start.

    Attributes:
        streams: admitted streams.
        readers: tasks that read requests.
        frames: frames that were read, until they are answered.
        tickets: frames that were sent to a model, until they are answered or taken back.
    """

    streams: Counter = field(default_factory=Counter)
    readers: Counter = field(default_factory=Counter)
    frames: Counter = field(default_factory=Counter)
    tickets: Counter = field(default_factory=Counter)

    @property
    def open(self) -> int:
        """How many things of any kind are still held."""
        return self.streams.open + self.readers.open + self.frames.open + self.tickets.open
