"""The frames of a stream: what may be read, what is dropped, what is counted. Tickets are fakes."""

import pytest

from heatlens_server.api.stream.open_streams import StreamCounters
from heatlens_server.api.stream.window import FrameWindow, PendingFrame
from heatlens_server.core.errors import FrameDropped


class Ticket:
    """Waits until it is claimed or given up."""

    def __init__(self) -> None:
        self.waiting = True
        self.error: Exception | None = None

    def claim(self) -> None:
        self.waiting = False

    def give_up(self, error: Exception) -> bool:
        if not self.waiting:
            return False
        self.waiting, self.error = False, error
        return True


class Rig:
    def __init__(self, size: int, *, drop_oldest: bool, max_waiting: int = 99) -> None:
        self.counters = StreamCounters()
        self.window = FrameWindow(
            size=size,
            drop_oldest=drop_oldest,
            max_waiting=max_waiting,
            max_unsent=64,
            counters=self.counters,
        )
        self.tickets: list[Ticket] = []

    def send(self) -> bool:
        """A frame that is to be explained; False if there is no place for it."""
        if not self.window.make_room():
            return False
        self.tickets.append(Ticket())
        self.window.add(PendingFrame(len(self.tickets), self.tickets[-1]))
        return True

    def dropped(self) -> list[int]:
        return [i for i, ticket in enumerate(self.tickets) if isinstance(ticket.error, FrameDropped)]


def test_blocking_counts_every_frame():
    rig = Rig(3, drop_oldest=False)
    rig.send()
    rig.window.add(PendingFrame(2))
    rig.window.add(PendingFrame(3, error=ValueError()))
    assert not rig.window.has_room()
    rig.window.pop()
    assert rig.window.has_room()
    assert rig.window.head.frame_id == 2
    assert rig.dropped() == []


@pytest.mark.parametrize("size", [1, 3])
def test_dropping_gives_up_the_oldest_that_waits(size):
    rig = Rig(size, drop_oldest=True)
    for _ in range(6):
        assert rig.window.has_room()
        assert rig.send()
    assert rig.dropped() == list(range(6 - size))


def test_no_more_wait_than_fit_in_a_batch():
    rig = Rig(10, drop_oldest=True, max_waiting=2)
    for _ in range(5):
        assert rig.send()
    assert rig.dropped() == [0, 1, 2]
    rig.tickets[3].claim()
    assert rig.send()
    assert rig.dropped() == [0, 1, 2]


def test_frames_that_run_are_passed_over():
    rig = Rig(3, drop_oldest=True)
    for _ in range(3):
        rig.send()
    rig.tickets[0].claim()
    assert rig.send()
    assert rig.dropped() == [1]


def test_when_all_run_one_more_is_let_in_and_not_two():
    rig = Rig(2, drop_oldest=True)
    for _ in range(2):
        rig.send()
        rig.tickets[-1].claim()
    assert rig.send()
    assert rig.send()
    assert rig.dropped() == [2]
    rig.tickets[3].claim()
    assert not rig.window.has_room()
    assert not rig.send()
    for _ in range(3):  # two answered, one dropped: the last one runs
        rig.window.pop()
    assert rig.window.has_room()
    assert rig.send()
    assert rig.dropped() == [2]


def test_unsent_answers_are_bounded():
    rig = Rig(2, drop_oldest=True)
    rig.send()
    rig.tickets[0].claim()
    count = 1
    while rig.window.has_room():
        rig.window.add(PendingFrame(count))
        count += 1
        assert count < 1000
    assert len(rig.window) == 2 + 64


def test_a_frame_left_out_or_failed_holds_no_place():
    rig = Rig(1, drop_oldest=True)
    rig.send()
    for i in range(5):
        rig.window.add(PendingFrame(i, error=ValueError() if i % 2 else None))
    assert rig.window.has_room()
    assert rig.dropped() == []


@pytest.mark.parametrize(
    ("frames", "left"),
    [
        ("w", ""),
        ("rw", "r"),
        ("rwsw", "r"),
        ("rws", "r"),
        ("srsw", "srs"),
        ("wr", "wr"),
        ("wrw", "wr"),
        ("wwrsws", "wwrs"),
        ("ss", "ss"),
    ],
)
def test_cutting_leaves_what_runs_and_all_before_it(frames, left):
    """w waits, r runs, s is answered without the model."""
    rig = Rig(9, drop_oldest=False)
    for i, kind in enumerate(frames):
        ticket = None if kind == "s" else Ticket()
        rig.window.add(PendingFrame(i, ticket))
        if kind == "r":
            ticket.claim()
    assert rig.window.cut(ValueError("a")) == ("w" in frames)
    assert not rig.window.cut(ValueError("b"))
    assert len(rig.window) == len(left)
    while len(rig.window):
        frame = rig.window.head
        assert rig.window.holds(frame)
        assert (frame.ticket is not None and frame.ticket.error is not None) == (left[frame.frame_id] == "w")
        rig.window.pop()
        assert not rig.window.holds(frame)
    assert rig.counters.open == 0


def test_what_is_taken_is_given_back():
    rig = Rig(8, drop_oldest=True)
    for _ in range(5):
        rig.send()
    rig.window.add(PendingFrame(7))
    rig.tickets[0].claim()
    rig.window.pop()
    assert (rig.counters.frames.open, rig.counters.tickets.open) == (5, 4)
    rig.window.close(ValueError())
    assert (rig.counters.frames.created, rig.counters.tickets.created) == (6, 5)
    assert rig.counters.open == 0
    assert not any(ticket.waiting for ticket in rig.tickets)
