"""Which version of a model a request gets, by its states, weights and the hash of the request."""

import pytest

from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelChangeRefused, ModelNotFound, VersionNotFound
from heatlens_server.fleet.served_model import ModelState, ModelStatus
from heatlens_server.fleet.versions import choose, default_of, find, is_default, point_of


def status(version: str, state: ModelState = ModelState.READY, *, name: str = "m", **keys: object) -> ModelStatus:
    return ModelStatus(ModelConfig(name=name, source="embedded:efficientnet_lite0", version=version, **keys), state)


def chosen(statuses, at: float) -> str:
    return choose(statuses, "m", "", lambda: at).version


def never() -> float:
    raise AssertionError("nothing depends on it")


def test_shares_are_as_the_weights_say_and_a_larger_one_keeps_who_had_it():
    points = [point_of(str(number).encode()) for number in range(10_000)]
    assert all(0 <= point < 1 for point in points)
    got = {}
    for weight in (0.1, 0.3):
        canary = [status("1"), status("2", weight=weight)]
        got[weight] = {at for at in points if chosen(canary, at) == "2"}
        # The share of these hashes, exactly; and within five deviations of the weight.
        assert got[weight] == {at for at in points if at < weight}
        assert len(got[weight]) / len(points) == pytest.approx(weight, abs=5 * 0.0046)
    assert got[0.1] < got[0.3]


def test_equal_images_have_equal_points():
    assert point_of(b"image") == point_of(b"im", b"age") != point_of(b"another")
    # From one process, machine and version to the next.
    assert point_of(b"image") == 0.06261917601335931


def test_several_canaries_have_a_share_each():
    versions = [status("1", weight=0.25), status("2", default=True), status("3", weight=0.5)]
    assert [chosen(versions, at) for at in (0.0, 0.24, 0.25, 0.74, 0.75, 0.99)] == ["1", "1", "3", "3", "2", "2"]


@pytest.mark.parametrize("state", [ModelState.LOADING, ModelState.FAILED, ModelState.UNAVAILABLE])
def test_a_version_that_cannot_answer_loses_no_request(state):
    assert chosen([status("1"), status("2", state, weight=0.5)], 0.0) == "1"
    assert chosen([status("1", state), status("2", weight=0.5)], 0.9) == "2"
    assert chosen([status("1", state), status("2", state)], 0.9) == "1"
    # Who names it is told how it is.
    assert choose([status("1"), status("2", state)], "m", "2", never).state is state


def test_without_weights_nothing_is_hashed():
    others = [status("9", name="a", weight=0.0), status("1"), status("2", default=True)]
    assert choose(others, "m", "", never).version == "2"
    assert choose(others, "m", "1", never).version == "1"
    assert [is_default(one, others) for one in others] == [True, False, True]
    assert default_of(others[1:]) is others[2]


def test_what_there_is_not_is_refused_by_what_there_is():
    versions = [status("1"), status("2"), status("", name="a")]
    with pytest.raises(VersionNotFound, match=r"no version '3' of the model 'm'; this server has: 1, 2$") as raised:
        choose(versions, "m", "3", never)
    assert raised.value.metadata == {"model": "m", "available": "1,2", "version": "3"}
    with pytest.raises(ModelNotFound, match=r"no model 'b'; this server has: m, a$"):
        choose(versions, "b", "1", never)


def test_an_administrator_says_which_of_several():
    versions = [status("1"), status("2"), status("", name="a")]
    assert find(versions, "a", "") is versions[2]
    assert find(versions, "m", "2") is versions[1]
    with pytest.raises(ModelChangeRefused, match="several versions of the model 'm', 1, 2: say which"):
        find(versions, "m", "")
    with pytest.raises(VersionNotFound):
        find(versions, "a", "1")
