"""What calls account for of what connections send."""

import asyncio

import pytest

from heatlens_server.core.errors import PeerTooSlow, ServerDraining
from heatlens_server.transports.grpc.traffic import CALL_BYTES, CHECK, QUICK_S, UNREAD_BYTES, Traffic

MOST = 1 << 24


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def traffic(clock) -> Traffic:
    return Traffic(MOST, clock)


def test_a_call_accounts_for_its_message(traffic):
    with traffic.call("a") as call:
        assert (traffic.busy, traffic.room()) == (set(), {"a": UNREAD_BYTES})
        call.awaits = True
        assert traffic.room() == {"a": MOST}
        call.read(1000)
        assert (traffic.busy, traffic.room()) == ({"a"}, {"a": 0})
    assert traffic.accounted_since() == {"a": 1000 + CALL_BYTES}
    assert traffic.take() == ({"a": 1000 + CALL_BYTES}, {})
    assert traffic.take() == ({}, {})
    assert (traffic.busy, traffic.room()) == (set(), {})


def test_a_stream_may_send_as_long_as_it_is_open(traffic):
    with traffic.call("a", is_stream=True) as call:
        call.read(7)
        call.read(8)
        assert (traffic.busy, traffic.room()) == ({"a"}, {"a": MOST})
    assert traffic.take()[0] == {"a": 15 + CALL_BYTES}


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_that_is_refused_accounts_for_what_may_have_come_unread(traffic, is_stream):
    with pytest.raises(ServerDraining), traffic.call("a", is_stream=is_stream):
        raise ServerDraining
    assert traffic.take() == ({"a": UNREAD_BYTES + CALL_BYTES}, {})


def test_one_that_is_cut_off_accounts_for_a_message_that_was_not_whole(traffic):
    def cut_off() -> None:
        with traffic.call("a") as call:
            call.awaits = True
            raise PeerTooSlow("too slow", retry_after_s=1)

    with pytest.raises(PeerTooSlow):
        cut_off()
    assert traffic.take() == ({"a": MOST + CALL_BYTES}, {})


@pytest.mark.parametrize(
    ("lasted_s", "remaining_s", "left"),
    [(0.1, None, 1), (0.1, 5.0, 1), (0.1, 0.0, 0), (QUICK_S + 0.1, None, 0)],
    ids=["at once", "long before its deadline", "at its deadline", "later"],
)
def test_one_that_its_peer_leaves(traffic, clock, lasted_s, remaining_s, left):
    def leave() -> None:
        with traffic.call("a", remaining=lambda: remaining_s) as call:
            call.awaits = True
            clock.now_s += lasted_s
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave()
    accounted, left_calls = traffic.take()
    assert left_calls.get("a", 0) == left
    assert accounted["a"] == CALL_BYTES + MOST


@pytest.mark.parametrize(("is_stream", "room_bytes"), [(False, 0), (True, UNREAD_BYTES)])
def test_one_that_is_refused_for_what_it_asks_makes_no_room_for_much_else(traffic, is_stream, room_bytes):
    def refuse() -> None:
        with traffic.call("a", is_stream=is_stream) as call:
            call.awaits = True
            call.read(0)  # also what has no message
            call.is_at_fault = True
            assert (traffic.busy, traffic.room()) == (set(), {"a": room_bytes})
            raise ServerDraining

    with pytest.raises(ServerDraining):
        refuse()
    assert traffic.take() == ({"a": room_bytes + CALL_BYTES}, {})


def test_a_health_check_counts_as_a_part_of_a_call_that_is_left_whether_or_not_it_is(traffic):
    def leave() -> None:
        with traffic.call("a", is_check=True):
            raise asyncio.CancelledError

    with traffic.call("a", is_check=True) as call:
        call.read(0)
    assert traffic.take() == ({"a": CALL_BYTES}, {"a": CHECK})
    with pytest.raises(asyncio.CancelledError):
        leave()
    assert traffic.take()[1] == {"a": CHECK}
