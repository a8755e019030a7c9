"""Decoders take the images of owners in turns. The executor is driven by hand: no threads, no sleeps."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future

import pytest

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.decode_queue import DecodeQueue
from heatlens_server.scheduling.entry import Entry, Source

SPEC = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)


class Threads(Executor):
    """Runs what was submitted when told, first come, first served."""

    def __init__(self) -> None:
        self.calls: deque[Callable[[], object]] = deque()
        self.down = False

    def submit(self, call: Callable[[], object]) -> Future:
        if self.down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self.calls.append(call)
        return Future()

    def run(self) -> None:
        self.calls.popleft()()


class Rig:
    def __init__(self, *, at_once: int = 2, threads: Threads | None = None) -> None:
        self.threads = threads or Threads()
        self.decoded: list[Entry] = []
        self.queue = DecodeQueue(self.threads, self.decoded.append, at_once=at_once)

    def add(self, source: Source | None = None) -> Entry:
        entry = Entry(target=TopK(1), spec=SPEC, deadline=None, resolve=lambda outcome: None, source=source)
        self.queue.add(entry)
        return entry

    def run(self) -> list[Entry]:
        while self.threads.calls:
            self.threads.run()
        return self.decoded


def test_a_big_window_does_not_keep_others_waiting():
    rig = Rig()
    stream = Source()
    frames = [rig.add(stream) for _ in range(5)]
    small, caller = rig.add(Source()), rig.add()
    assert rig.run() == [frames[0], small, caller, *frames[1:]]


def test_the_executor_never_holds_more_calls_than_allowed():
    rig = Rig(at_once=3)
    entries = [rig.add() for _ in range(10)]
    assert len(rig.threads.calls) == 3
    for _ in range(5):
        rig.threads.run()
        assert len(rig.threads.calls) == 3
    assert rig.run() == entries
    late = rig.add()  # it starts again after it ran dry
    assert rig.run() == [*entries, late]


def test_models_that_share_threads_take_turns():
    threads = Threads()
    big, small = Rig(at_once=1, threads=threads), Rig(at_once=1, threads=threads)
    for _ in range(10):
        big.add()
    entry = small.add()
    threads.run()
    threads.run()
    assert small.decoded == [entry]
    assert len(big.decoded) == 1
    assert len(big.run()) == 10


def test_discarded_entries_are_not_decoded_and_cost_no_turn():
    rig = Rig(at_once=1)
    camera, rival = Source(), Source()
    old = [rig.add(camera) for _ in range(9)]
    others = [rig.add(rival) for _ in range(3)]
    new = rig.add(camera)
    for entry in old:
        rig.queue.discard(entry)
    assert rig.run() == [new, *others]
    rig.queue.discard(new)
    assert len(rig.decoded) == 4


def test_all_discarded_leaves_it_usable():
    rig = Rig(at_once=1)
    rig.queue.discard(rig.add())
    assert rig.run() == []
    entry = rig.add()
    assert rig.run() == [entry]


def test_an_executor_that_is_shut_down_takes_nothing_and_finishes_what_was_taken():
    rig = Rig(at_once=1)
    entries = [rig.add() for _ in range(3)]
    rig.threads.down = True
    assert rig.run() == entries
    for _ in range(3):
        with pytest.raises(RuntimeError, match="after shutdown"):
            rig.add()
    assert len(rig.queue) == 0
    rig.threads.down = False
    entry = rig.add()
    assert rig.run() == [*entries, entry]
