"""Models that are unloaded when they are used little, and loaded again on request: engines with gates, a fake clock."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from fleets import PATIENCE_S, Rig, closed, config, until
from heatlens_server.core.errors import ModelFailed, ModelLoadError, ModelLoading, ModelUnloaded, ServerDraining
from heatlens_server.fleet.fleet import ModelState

READY, IDLE = ModelState.READY, ModelState.IDLE


def idle_after(name: str, idle_unload_s: float):
    return config(name).model_copy(update={"idle_unload_s": idle_unload_s})


@pytest_asyncio.fixture
async def small():
    """A fleet whose memory holds two of its models, of 100 bytes each."""
    with ThreadPoolExecutor(4) as decoders:
        made = Rig(decoders, budget_bytes=250)
        yield made
        for gate in [*made.gates.values(), *(engine.gate for engine in made.engines)]:
            gate.set()
        await made.fleet.close(timeout_s=PATIENCE_S)


async def load(rig: Rig, names: str) -> None:
    """Load models one second after the other."""
    for name in names:
        await rig.fleet.load(config(name))
        rig.now_s += 1.0
    await rig.fleet.idle.look()


def states(rig: Rig) -> str:
    """The names of the models, in capitals if they are loaded."""
    return "".join(name.upper() if state is READY else name for name, state in rig.states())


async def test_a_model_that_nobody_uses_is_unloaded_and_the_next_request_loads_it_again(rig):
    await rig.fleet.load(idle_after("a", 60.0))
    await rig.fleet.load(config("b"))
    assert await rig.ask("a") == 1
    rig.now_s = 59.9
    await rig.fleet.idle.look()
    assert states(rig) == "AB"
    rig.now_s = 60.0
    await rig.fleet.idle.look()
    assert states(rig) == "aB"
    assert rig.engines[0].closed.is_set()
    (status, _) = rig.fleet
    assert (status.served, status.known.capabilities, status.known.queue) == (None, rig.engines[0].info, None)
    assert rig.changes.seen[-1] == ("a", "idle", "nobody has used it for 60 s")
    # All at once: one load, which all of them wait for.
    assert await asyncio.gather(*(rig.ask("a") for _ in range(5))) == [3] * 5
    assert (states(rig), len(rig.engines)) == ("AB", 3)


async def test_what_is_used_is_not_unloaded(rig):
    await rig.fleet.load(idle_after("a", 1.0))
    with rig.fleet.use("a"):
        rig.now_s = 100.0
        await rig.fleet.idle.look()
        assert states(rig) == "A"
    # Idle from the end of the last use on.
    await rig.fleet.idle.look()
    assert states(rig) == "A"
    rig.now_s = 101.0
    await rig.fleet.idle.look()
    assert states(rig) == "a"


async def test_an_engine_that_is_to_follow_keeps_its_model(rig):
    rig.next_engine, rig.gates["a+"] = "faster", threading.Event()
    await rig.fleet.load(idle_after("a", 1.0))
    rig.now_s = 100.0
    await rig.fleet.idle.look()
    assert states(rig) == "A"


async def test_the_least_recently_used_model_makes_room(small):
    await load(small, "abc")
    assert states(small) == "aBC"
    assert await small.ask("b") == 2
    small.now_s += 1.0
    assert await small.ask("a") == 4
    assert states(small) == "ABc"
    # It was closed before what came in its place was built.
    assert small.engines[2].closed.is_set()
    assert small.changes.seen[-2:] == [
        ("c", "idle", "its memory is needed"),
        ("a", "ready", "fake on cpu in fp32, layer layer"),
    ]


async def test_many_models_take_turns_in_little_memory(small):
    await load(small, "abcdef")
    answers = await asyncio.gather(*(small.ask(name) for name in "abcdefabc"), return_exceptions=True)
    # Who finds all the memory in use is told to try again.
    assert {type(answer) for answer in answers} <= {int, ModelLoading}
    for name in "abcdef":
        assert isinstance(await small.ask(name), int)
        assert sum(state is READY for _, state in small.states()) <= 2


async def test_used_models_keep_their_memory_and_others_are_told_to_try_again(small, caplog):
    await load(small, "abc")
    with small.fleet.use("b"), small.fleet.use("c"):
        with pytest.raises(ModelLoading, match="the others on its device are all used") as raised:
            await small.ask("a")
        assert (raised.value.reason, raised.value.retry_after_s) == ("MODEL_MEMORY_FULL", 1.0)
        assert states(small) == "aBC"
        # A configuration may still load more than fits.
        await small.fleet.load(config("d"))
        with small.fleet.use("d"):
            for _ in range(2):
                await small.fleet.idle.look()
            assert caplog.text.count("take 300 bytes, beyond the memory_budget_bytes of 250") == 1
    assert isinstance(await small.ask("a"), int)


async def test_a_model_that_is_larger_than_the_budget_is_served_alone():
    with ThreadPoolExecutor(1) as decoders:
        rig = Rig(decoders, budget_bytes=10)
        await load(rig, "ab")
        assert states(rig) == "aB"
        assert await rig.ask("a") == 3
        assert states(rig) == "Ab"
        await rig.fleet.idle.look()
        assert states(rig) == "Ab"
        assert await rig.fleet.close()


async def test_a_model_that_cannot_be_loaded_again_says_why_and_is_tried_again(rig):
    await rig.fleet.load(idle_after("a", 1.0))
    rig.now_s = 1.0
    await rig.fleet.idle.look()
    rig.errors["a"] = ModelLoadError("no weights")
    with pytest.raises(ModelFailed, match="no weights"):
        await rig.ask("a")
    (status,) = rig.fleet
    assert (status.state, status.message) == (IDLE, "no weights")
    del rig.errors["a"]
    assert await rig.ask("a") == 2
    (status,) = rig.fleet
    assert (status.state, status.message) == (READY, "")


@pytest.mark.parametrize("way", ["unload", "close"])
async def test_callers_that_wait_hear_what_became_of_their_model(rig, way):
    await rig.fleet.load(idle_after("a", 1.0))
    rig.now_s = 1.0
    await rig.fleet.idle.look()
    rig.gates["a"] = threading.Event()
    waiting = asyncio.create_task(rig.ask("a"))
    await until(lambda: any(thread.name == "load-a" for thread in threading.enumerate()))
    if way == "unload":
        await rig.fleet.unload("a")
    else:
        rig.fleet.stop_loading()
    with pytest.raises(ModelUnloaded if way == "unload" else ServerDraining):
        await waiting
    rig.gates["a"].set()
    await until(lambda: len(rig.engines) == 2)
    assert await closed(rig.engines[1])


async def test_a_caller_that_leaves_does_not_end_the_load_that_others_wait_for(rig):
    await rig.fleet.load(idle_after("a", 1.0))
    rig.now_s = 1.0
    await rig.fleet.idle.look()
    rig.gates["a"] = threading.Event()
    leaving, staying = (asyncio.create_task(rig.ask("a")) for _ in range(2))
    await until(lambda: any(thread.name == "load-a" for thread in threading.enumerate()))
    leaving.cancel()
    rig.gates["a"].set()
    assert await staying == 2


async def test_an_idle_model_is_replaced_and_unloaded_as_any_other(rig):
    for name in "ab":
        await rig.fleet.load(idle_after(name, 1.0))
    rig.now_s = 1.0
    await rig.fleet.idle.look()
    assert states(rig) == "ab"
    await rig.fleet.replace(config("a"))
    await rig.fleet.unload("b")
    assert states(rig) == "A"
    assert await rig.ask("a") == 3
