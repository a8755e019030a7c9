"""The window of a stream, without a stream: random walks against a plain list of what must come, and single cases."""

import traceback
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from heatlens import FailedPreconditionError, InternalError, InvalidArgumentError, ResourceExhaustedError
from heatlens._stream.window import MAX_FRAME_ID, Window

RESULT = SimpleNamespace(explanations=())


def started(size=2, *, drop_oldest=False, every=1):
    window = Window(drop_oldest=drop_oldest, every=every)
    window.start(size)
    return window


def put(window, frame_id=None, frame=None, now_s=0.0):
    """Put a frame whose message is its id; return the id."""
    frame_id = window.checked_id(frame_id)
    window.put(frame_id, frame, frame_id, accepted_s=now_s, now_s=now_s)
    return frame_id


def taken(window):
    items = []
    while window.answered:
        items.append(window.take())
    return items


class WindowWalk(RuleBasedStateMachine):
    """The server is a list of the ids it read; the caller one of the ids it took."""

    @initialize(size=st.integers(1, 4), drop_oldest=st.booleans(), every=st.integers(1, 3))
    def begin(self, size, drop_oldest, every):
        self.size, self.drop_oldest, self.every = size, drop_oldest, every
        self.window = started(size, drop_oldest=drop_oldest, every=every)
        self.frames = {}  # every frame accepted and not forgotten, by id
        self.refused = set()
        self.sent = []  # ids on the wire and unanswered
        self.sent_count = 0
        self.outcomes = {}  # what the server said, by id
        self.due = []  # accepted, not forgotten, not taken: these must come, in this order
        self.now_s = 0.0

    def tick(self):
        self.now_s += 0.001
        return self.now_s

    @precondition(lambda self: self.window.can_put and not self.window.finishing)
    @rule(gap=st.integers(0, 3))
    def put(self, gap):
        frame_id = self.window.checked_id(None) + gap
        frame = self.frames[frame_id] = object()
        skipped = self.window.next_is_skipped
        self.window.put(frame_id, frame, (frame_id, skipped), accepted_s=self.now_s, now_s=self.tick())
        self.due.append(frame_id)

    @precondition(lambda self: self.window.can_put and not self.window.finishing)
    @rule()
    def refuse(self):
        frame_id = self.window.checked_id(None)
        self.frames[frame_id] = object()
        self.refused.add(frame_id)
        error = InvalidArgumentError("no")
        self.window.refuse(frame_id, self.frames[frame_id], error, accepted_s=self.now_s, now_s=self.tick())
        self.due.append(frame_id)

    @precondition(lambda self: self.window.outgoing)
    @rule()
    def send(self):
        frame_id, skipped = self.window.outgoing.popleft()
        assert not self.sent or frame_id > self.sent[-1]
        assert skipped == (self.sent_count % self.every != 0), "the server counts what it reads"
        self.sent.append(frame_id)
        self.sent_count += 1

    @precondition(lambda self: self.sent)
    @rule(kind=st.sampled_from(["result", "error", "skipped"]))
    def answer(self, kind):
        frame_id = self.sent.pop(0)
        said = {"result": RESULT, "error": ResourceExhaustedError("late"), "skipped": True}[kind]
        self.outcomes[frame_id] = (kind, said)
        self.window.answer(frame_id, now_s=self.tick(), **{kind: said})
        assert self.window.last_frame_id >= frame_id

    @precondition(lambda self: self.window.answered)
    @rule()
    def take(self):
        item = self.window.take()
        assert item.frame_id == self.due.pop(0)
        assert item.frame is self.frames[item.frame_id]
        assert item.latency_ms > 0
        if item.frame_id in self.refused:
            assert isinstance(item.error, InvalidArgumentError)
        elif item.frame_id in self.outcomes:
            kind, said = self.outcomes[item.frame_id]
            assert getattr(item, kind) is said
        else:
            assert item.dropped
            assert self.drop_oldest
        assert (item.result is not None) + (item.error is not None) + item.skipped == 1

    @rule()
    def forget(self):
        self.window.forget()
        self.due.clear()

    @invariant()
    def bounds(self):
        window = self.window
        on_wire = len(self.sent) + len(window.outgoing)
        assert on_wire <= (2 * self.size if self.drop_oldest else self.size)
        assert window.ahead == len(self.due) <= window.backlog
        assert len(window._pending) + len(window._ready) >= window.ahead
        if not on_wire and not self.drop_oldest:
            assert window.idle

    @precondition(lambda self: self.due)
    @rule()
    def everything_comes(self):
        """Whatever happened, if the server answers and the caller takes, every frame gets its answer."""
        while self.due:
            before = len(self.due)
            while self.window.outgoing:
                self.send()
            if self.sent:
                self.answer("result")
            if self.window.answered:
                self.take()
            assert self.sent or self.window.outgoing or len(self.due) < before or self.window.answered


WindowWalk.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
test_random_walks = WindowWalk.TestCase


def test_nothing_may_be_done_before_the_start():
    window = Window(drop_oldest=True, every=1)
    assert not window.can_put
    assert not window.may_pull
    with pytest.raises(InternalError, match="window of 0"):
        window.start(0)
    window.start(1)
    with pytest.raises(InternalError):
        window.start(1)


def test_block_is_full_at_the_window_whoever_takes_the_answers():
    window = started(2)
    assert [put(window), put(window)] == [0, 1]
    assert not window.can_put
    window.answer(0, now_s=1.0, result=RESULT)
    assert window.can_put, "answered is enough for send"
    assert not window.may_pull, "but map waits for its loop"
    window.take()
    assert window.may_pull


def test_drop_oldest_keeps_two_windows_on_the_wire_and_the_newest_at_hand():
    window = started(2, drop_oldest=True)
    for _ in range(7):
        assert window.can_put
        put(window)
    assert list(window.outgoing) == [0, 1, 2, 3]
    assert not window.answered, "dropped frames wait for their turn"
    for frame_id in range(4):
        window.answer(frame_id, now_s=1.0, error=ResourceExhaustedError("x"))
    assert list(window.outgoing)[4:] == [6]
    items = taken(window)
    assert [(item.frame_id, item.dropped) for item in items] == [
        (0, False), (1, False), (2, False), (3, False), (4, True), (5, True)
    ]  # fmt: skip
    assert items[-1].error.reason == "FRAME_DROPPED"
    assert isinstance(items[-1].error, ResourceExhaustedError)


def test_drop_oldest_a_late_reader_gets_fresh_answers_not_a_long_queue():
    window = started(1, drop_oldest=True)
    for _ in range(100):
        frame_id = put(window)
        if window.outgoing:
            window.answer(window.outgoing.popleft(), now_s=0.0, result=RESULT)
    items = taken(window)
    assert [item.frame_id for item in items if item.result is not None] == [0, 1]
    assert [item.frame_id for item in items] == list(range(99)), "all but the newest, which is sent now"
    assert list(window.outgoing) == [frame_id]


def test_drop_oldest_is_bounded_all_the_same():
    window = started(3, drop_oldest=True)
    count = 0
    while window.can_put:
        put(window)
        count += 1
    assert count == window.backlog == 2 * 3 + 256


@pytest.mark.parametrize(("map_mib", "kept"), [(1, 64), (40, 4), (0, None)])
def test_block_maps_not_taken_are_bounded_in_bytes(map_mib, kept):
    heatmap = SimpleNamespace(values=SimpleNamespace(nbytes=map_mib << 20))
    result = SimpleNamespace(explanations=[SimpleNamespace(heatmap=heatmap)])
    window = started(4)
    count = 0
    while window.can_put:
        window.answer(put(window), now_s=0.0, result=result)
        count += 1
    assert count == (kept or window.backlog)
    window.take()
    assert window.can_put
    window.answer(put(window), now_s=0.0, result=result)
    window.forget()
    assert window.can_put


def test_a_frame_held_back_takes_its_turn_after_every():
    window = started(1, drop_oldest=True, every=2)
    put(window)  # 0: explained
    assert window.next_is_skipped
    put(window)  # 1: left out, the wire is full now
    assert not window.next_is_skipped
    put(window)  # 2: held back, to be explained
    assert not window.next_is_skipped, "a frame that replaces it takes its turn"
    put(window)
    window.answer(0, now_s=0, result=RESULT)
    window.take()
    assert list(window.outgoing) == [0, 1, 3]
    assert window.next_is_skipped


@pytest.mark.parametrize("frame_id", [3, 0, -1, MAX_FRAME_ID + 1, 4.0, "4", True, float("nan")])
def test_ids_increase(frame_id):
    window = started()
    put(window, 3)
    with pytest.raises(InvalidArgumentError) as caught:
        window.checked_id(frame_id)
    assert caught.value.field_violations[0].field == "frame_id"
    assert window.checked_id(None) == 4


def test_the_largest_id_is_the_last():
    window = started()
    put(window, MAX_FRAME_ID)
    for frame_id in (None, MAX_FRAME_ID, 0):
        with pytest.raises(InvalidArgumentError, match="frame_id"):
            window.checked_id(frame_id)


@pytest.mark.parametrize("frame_id", [1, 7, -1])
def test_an_answer_out_of_turn_breaks_the_contract(frame_id):
    window = started()
    put(window), put(window)
    with pytest.raises(InternalError) as caught:
        window.answer(frame_id, now_s=0.0, skipped=True)
    assert caught.value.reason == "INVALID_RESPONSE"


def test_an_answer_for_a_frame_that_was_never_sent_breaks_the_contract():
    window = started(1, drop_oldest=True)
    for _ in range(3):
        put(window)
    for frame_id in (0, 1):
        window.answer(frame_id, now_s=0.0, result=RESULT)
    with pytest.raises(InternalError):
        window.answer(2, now_s=0.0, skipped=True)


def test_the_end_keeps_answers_that_came_and_says_which_was_the_last():
    window = started(3)
    for _ in range(3):
        put(window)
    window.answer(0, now_s=0.0, result=RESULT)
    window.end(InternalError("gone"))
    window.end(ResourceExhaustedError("too late to count"))
    assert [item.frame_id for item in taken(window)] == [0]
    assert window.ahead == 0
    assert not window.outgoing
    with pytest.raises(InternalError, match="gone") as caught:
        window.raise_if_broken()
    assert caught.value.last_frame_id == 0
    with pytest.raises(InternalError):
        window.check_accepts()


def test_the_error_of_the_end_does_not_grow_with_each_raise():
    window = started()
    window.end(InternalError("gone", request_id="r"))
    lengths = set()
    for _ in range(5):
        with pytest.raises(InternalError) as caught:
            window.raise_if_broken()
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        assert caught.value.request_id == "r"
    assert len(lengths) == 1


def test_an_end_without_error_is_an_error_while_answers_are_due():
    for prepare in (lambda window: None, put, lambda window: (put(window), window.finish())):
        window = started()
        prepare(window)
        window.end(None)
        assert window.error is not None
    window = started()
    put(window)
    window.outgoing.clear()
    window.answer(0, now_s=0.0, result=RESULT)
    window.finish()
    window.end(None)
    assert window.error is None
    with pytest.raises(FailedPreconditionError, match="no more frames"):
        window.check_accepts()


def test_the_half_close_waits_for_the_frame_held_back():
    window = started(1, drop_oldest=True)
    for _ in range(3):
        put(window)
    window.finish()
    window.outgoing.clear()
    assert not window.half_closed
    window.answer(0, now_s=0.0, skipped=True)
    assert list(window.outgoing) == [2]
    window.outgoing.clear()
    assert window.half_closed


def test_latency_is_from_acceptance_to_answer():
    window = started()
    window.put(0, "a", 0, accepted_s=10.0, now_s=10.5)
    window.answer(0, now_s=12.0, result=RESULT)
    item = window.take()
    assert item.latency_ms == 2000.0
    assert "FrameResult(0, result=" in repr(item)
