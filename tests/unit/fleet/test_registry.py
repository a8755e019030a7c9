"""The states of models, and what callers of each get."""

import pytest

from heatlens_server.core.errors import ModelFailed, ModelLoading, ModelNotFound
from heatlens_server.fleet.registry import ModelState, Registry


@pytest.fixture
def registry() -> Registry[str]:
    return Registry(["a", "b", "c"], default="b")


def states(registry: Registry[str]) -> list[tuple[str, ModelState]]:
    return [(slot.name, slot.state) for slot in registry.slots]


def test_all_are_loading_at_first_in_order(registry):
    assert states(registry) == [(name, ModelState.LOADING) for name in "abc"]
    with pytest.raises(ModelLoading) as raised:
        registry.get("a")
    assert raised.value.metadata == {"model": "a"}
    assert raised.value.retry_after_s > 0


def test_a_ready_model_is_got_by_its_name(registry):
    registry.set_ready("c", "served c")
    assert registry.get("c") == "served c"
    assert states(registry)[2] == ("c", ModelState.READY)
    with pytest.raises(ModelLoading):
        registry.get("a")


def test_no_name_is_the_default(registry):
    with pytest.raises(ModelLoading, match="'b'"):
        registry.get("")
    registry.set_ready("b", "served b")
    assert registry.get("") == "served b"


def test_a_failed_model_says_why_and_is_not_to_be_retried(registry):
    registry.set_failed("a", "no weights")
    with pytest.raises(ModelFailed, match="no weights") as raised:
        registry.get("a")
    assert raised.value.name == "a"
    assert raised.value.retry_after_s is None
    assert (registry.slots[0].value, registry.slots[0].message) == (None, "no weights")


def test_a_model_that_fails_later_serves_no_more(registry):
    registry.set_ready("a", "served a")
    registry.set_failed("a", "gone")
    with pytest.raises(ModelFailed):
        registry.get("a")
    registry.set_ready("a", "again")
    assert registry.get("a") == "again"
    assert registry.slots[0].message == ""


def test_order_is_kept_whatever_becomes_ready_first(registry):
    registry.set_ready("c", "c")
    registry.set_failed("b", "x")
    registry.set_ready("a", "a")
    assert states(registry) == [("a", ModelState.READY), ("b", ModelState.FAILED), ("c", ModelState.READY)]


@pytest.mark.parametrize("name", ["d", "A", " a", "a\n"])
def test_unknown_names(registry, name):
    with pytest.raises(ModelNotFound) as raised:
        registry.get(name)
    assert raised.value.metadata == {"model": name, "available": "a,b,c"}


def test_a_long_unknown_name_is_not_repeated_in_full(registry):
    with pytest.raises(ModelNotFound) as raised:
        registry.get("x" * 100_000)
    assert len(raised.value.message) < 200
    assert raised.value.name == "x" * 80


def test_snapshots_do_not_change(registry):
    before = registry.slots
    registry.set_ready("a", "a")
    assert before[0].state is ModelState.LOADING
