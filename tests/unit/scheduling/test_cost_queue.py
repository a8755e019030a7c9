"""Classes of cost with equal shares, and owners in turns within each."""

import pytest

from heatlens_server.scheduling.cost_queue import CostQueue


def taken(queue: CostQueue[str], count: int | None = None) -> str:
    return " ".join(queue.take() for _ in range(len(queue) if count is None else count))


def test_a_cheap_item_waits_for_a_dear_one_and_not_for_all():
    queue: CostQueue[str] = CostQueue()
    for owner in range(50):
        queue.put(owner, "dear", cost=1.5)
    assert taken(queue, 3) == "dear dear dear"
    queue.put("other", "cheap", cost=0.1)
    assert taken(queue, 2) == "cheap dear"


def test_classes_have_equal_shares_of_the_work_and_none_is_starved():
    queue: CostQueue[str] = CostQueue()
    for number in range(40):
        queue.put(number, "a", cost=1.0)
        queue.put(number, "b", cost=4.0)
    first = taken(queue, 20).split()
    assert first.count("b") == 4
    assert first.count("a") == 16
    assert len(taken(queue).split()) == 60


def test_having_been_idle_earns_nothing():
    queue: CostQueue[str] = CostQueue()
    queue.put("x", "a", cost=1.0)
    for number in range(10):
        queue.put(number, "b", cost=1.0)
        queue.put(number, "c", cost=2.0)
    taken(queue, 21)
    queue.put("x", "d", cost=100.0)
    for number in range(20):
        queue.put(number, "e", cost=30.0)
    assert taken(queue, 6).split().count("d") == 1


def test_owners_of_a_class_take_turns_and_items_can_be_taken_out():
    queue: CostQueue[str] = CostQueue()
    for item in ("a0", "a1", "a2", "b0"):
        queue.put(item[0], item, cost=1.0)
    assert not queue.remove("a", "a1", cost=64.0, keep_turn=False)
    assert queue.remove("a", "a1", cost=1.0, keep_turn=False)
    assert taken(queue) == "a0 b0 a2"
    with pytest.raises(LookupError):
        queue.take()
    assert not queue.remove("a", "a0", cost=1.0, keep_turn=False)
