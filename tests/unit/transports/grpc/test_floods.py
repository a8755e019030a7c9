"""Who floods, by what the kernel counts and what calls account for. The clock is the test's."""

import pytest

from heatlens_server.transports.grpc.floods import (
    ALLOWED_BYTES,
    ALLOWED_BYTES_S,
    ALLOWED_CALLS,
    ALLOWED_CALLS_S,
    Came,
    Floods,
)

MB = 1 << 20
A1, A2, B = ("10.0.0.1", 1), ("10.0.0.1", 2), ("10.0.0.2", 1)


@pytest.fixture
def floods() -> Floods:
    made = Floods(lambda address: address[0])
    made.look({A1: Came(0), A2: Came(0), B: Came(0)}, 0.0)
    return made


def test_bytes_of_no_call_are_too_much_of_all_connections_of_a_host_together(floods):
    half, more = ALLOWED_BYTES // 2 + MB, ALLOWED_BYTES_S
    assert floods.look({A1: Came(half), A2: Came(0), B: Came(half)}, 0.0) == ([], [])
    close, began = floods.look({A1: Came(half), A2: Came(half + more), B: Came(half)}, 1.0)
    assert (set(close), began) == ({A1, A2}, [A1])
    assert floods.banned(1.0) == ["10.0.0.1"]


def test_what_calls_account_for_or_may_still_take_is_none(floods):
    received = 0
    for second in range(1, 20):
        received += 100 * MB
        # Half of it is a message that is not whole yet.
        came = Came(received, accounted_bytes=100 * MB if second > 1 else 50 * MB, room_bytes=50 * MB)
        assert floods.look({A1: came}, float(second)) == ([], [])


def test_accounts_that_come_first_are_credit_which_is_bounded(floods):
    assert floods.look({A1: Came(0, accounted_bytes=1000 * MB)}, 0.0) == ([], [])
    assert floods.look({A1: Came(16 * MB + ALLOWED_BYTES)}, 0.0) == ([], [])
    assert floods.look({A1: Came(16 * MB + ALLOWED_BYTES + 1)}, 0.0) == ([A1], [A1])


def test_what_came_while_the_server_was_busy_is_none(floods):
    after_s = 3.5
    flood = Came(2 * ALLOWED_BYTES, accounted_bytes=MB, left_calls=2 * ALLOWED_CALLS)
    assert floods.look({A1: flood}, after_s) == ([], [])
    assert floods.look({A1: Came(3 * ALLOWED_BYTES)}, after_s) == ([], [])
    assert floods.look({A1: Came(4 * ALLOWED_BYTES)}, after_s) == ([A1], [A1])


def test_a_little_again_and_again_is_let_pass(floods):
    received = 0
    for second in range(1, 100):
        received += ALLOWED_BYTES_S
        assert floods.look({A1: Came(received)}, float(second)) == ([], [])


def test_calls_that_are_left_at_once_count_whatever_they_account_for(floods):
    many = Came(0, accounted_bytes=100 * MB, left_calls=ALLOWED_CALLS // 2)
    assert floods.look({A1: many, A2: many}, 0.0) == ([], [])
    for second in range(1, 10):
        assert floods.look({A1: Came(0, left_calls=ALLOWED_CALLS_S // 2), A2: Came(0)}, float(second)) == ([], [])
    close, _ = floods.look({A1: Came(0, left_calls=ALLOWED_CALLS), A2: Came(0)}, 9.0)
    assert set(close) == {A1, A2}


def test_calls_of_connections_that_are_gone_count_too(floods):
    for number in range(2):
        assert floods.look({("10.0.0.1", number): Came(0, left_calls=ALLOWED_CALLS // 2)}, 0.0) == ([], [])
        assert floods.look({B: Came(0)}, 0.0) == ([], [])
    assert floods.look({A1: Came(0, left_calls=1), B: Came(0)}, 0.0) == ([A1], [A1])


def test_a_ban_ends_and_the_next_is_twice_as_long(floods):
    flood, now_s, lengths_s = 0, 1.0, []
    for _ in range(8):
        flood += 2 * ALLOWED_BYTES
        close, began = floods.look({A1: Came(flood)}, now_s)
        assert close
        assert began
        since_s = now_s
        while floods.banned(now_s):
            # What comes meanwhile is closed too, and is no news.
            now_s += 1.0
            close, began = floods.look({A2: Came(0)}, now_s)
            assert not began
            assert bool(close) is bool(floods.banned(now_s))
        lengths_s.append(now_s - since_s)
    assert lengths_s == [5, 10, 20, 40, 80, 160, 300, 300]
    floods.look({A1: Came(0)}, now_s + 1000)
    floods.look({A1: Came(2 * ALLOWED_BYTES)}, now_s + 1000)
    assert floods.banned(now_s + 1004)
    assert not floods.banned(now_s + 1005)
