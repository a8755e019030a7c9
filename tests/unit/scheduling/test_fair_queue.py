"""A ring of owners, each with a line."""

import pytest

from heatlens_server.scheduling.fair_queue import FairQueue


def filled(*owners: str) -> FairQueue[str]:
    """Items "a0", "a1", "b0" of owners a, a, b."""
    turns: FairQueue[str] = FairQueue()
    seen: dict[str, int] = {}
    for owner in owners:
        turns.put(owner, f"{owner}{seen.setdefault(owner, 0)}")
        seen[owner] += 1
    return turns


def drained(turns: FairQueue[str]) -> str:
    return " ".join(turns.take() for _ in range(len(turns)))


def test_owners_take_turns_and_each_line_keeps_its_order():
    assert drained(filled(*"aaaabbc")) == "a0 b0 c0 a1 b1 a2 a3"


def test_newcomers_join_at_the_end_of_the_round():
    turns = filled(*"aaabbb")
    assert turns.take() == "a0"
    turns.put("c", "c0")
    assert drained(turns) == "b0 a1 c0 b1 a2 b2"


def test_an_owner_that_comes_back_has_neither_credit_nor_debt():
    turns = filled(*"aaaa")
    assert [turns.take() for _ in range(4)] == ["a0", "a1", "a2", "a3"]
    for owner in "bbaa":
        turns.put(owner, owner)
    assert drained(turns) == "b a b a"


def test_length_and_items():
    turns = filled(*"aab")
    assert (len(turns), sorted(turns)) == (3, ["a0", "a1", "b0"])
    turns.take()
    assert (len(turns), sorted(turns)) == (2, ["a1", "b0"])


def test_nothing_to_take():
    with pytest.raises(LookupError, match="no item waits"):
        filled().take()


def test_what_is_removed_costs_no_turn():
    turns = filled(*"aaabb")
    assert turns.remove("a", "a0", keep_turn=True)
    assert not turns.remove("a", "a0", keep_turn=True)
    assert not turns.remove("z", "a1", keep_turn=True)
    assert drained(turns) == "a1 b0 a2 b1"


@pytest.mark.parametrize(("keep_turn", "order"), [(True, "a9 b0 c0 b1"), (False, "b0 c0 a9 b1")])
def test_an_only_item_that_is_replaced_keeps_its_turn_if_asked(keep_turn, order):
    turns = filled(*"abbc")
    turns.remove("a", "a0", keep_turn=keep_turn)
    turns.put("a", "a9")
    assert drained(turns) == order


def test_a_kept_turn_is_lost_when_it_comes_and_nothing_is_there():
    turns = filled(*"abbbc")
    turns.remove("a", "a0", keep_turn=True)
    assert turns.take() == "b0"
    turns.put("a", "a9")
    assert drained(turns) == "c0 b1 a9 b2"


def test_nothing_is_kept_of_owners_that_went():
    turns = filled(*"abc")
    turns.remove("b", "b0", keep_turn=True)
    turns.remove("a", "a0", keep_turn=False)
    assert drained(turns) == "c0"
    turns.put("d", "d0")
    turns.remove("d", "d0", keep_turn=True)
    assert not turns._lines
