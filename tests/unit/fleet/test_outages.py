"""A model that hangs, and goes on after all: real queues and threads, and an engine behind a gate."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from fleets import PATIENCE_S, Engine, Rig, config, until
from heatlens_server.core.errors import ModelInterrupted
from heatlens_server.fleet import outages
from heatlens_server.fleet.fleet import ModelState
from heatlens_server.scheduling import device_threads

HANG_AFTER_S = 0.2


@pytest_asyncio.fixture
async def rig(monkeypatch) -> AsyncIterator[Rig]:
    monkeypatch.setattr(outages, "WATCH_S", 0.01)
    monkeypatch.setattr(device_threads, "FIRST_RETRY_S", 0.01)
    with ThreadPoolExecutor(4) as decoders:
        made = Rig(decoders)
        for name in ("a", "b"):
            await made.fleet.load(config(name).model_copy(update={"hang_after_s": HANG_AFTER_S}))
        made.hung = []
        watching = asyncio.create_task(outages.watch(made.fleet, on_hang=made.hung.append))
        yield made
        watching.cancel()
        for engine in made.engines:
            engine.gate.set()
        await made.fleet.close(timeout_s=PATIENCE_S)


async def hang(rig: Rig) -> "list[asyncio.Task[int]]":
    """Calls of which one is in the first model, which does not answer."""
    rig.engines[0].gate.clear()
    calls = [asyncio.create_task(rig.ask("a")) for _ in range(3)]
    assert await asyncio.to_thread(rig.engines[0].entered.wait, PATIENCE_S)
    return calls


async def test_callers_of_a_model_that_hangs_are_told_and_others_are_answered(rig):
    for error in await asyncio.gather(*await hang(rig), return_exceptions=True):
        assert isinstance(error, ModelInterrupted)
        assert (error.reason, error.metadata) == ("MODEL_HUNG", {"model": "a"})
        assert error.retry_after_s > 0
    await until(lambda: rig.hung == ["a"])
    assert rig.states() == [("a", ModelState.UNAVAILABLE), ("b", ModelState.READY)]
    with pytest.raises(ModelInterrupted, match="hangs"):
        rig.fleet.get("a")
    assert await rig.ask("b") == 2
    ((model, error),) = rig.ended
    assert (model.name, error.reason) == ("a", "MODEL_HUNG")


async def test_a_run_that_ends_after_all_brings_the_model_back(rig):
    await asyncio.gather(*await hang(rig), return_exceptions=True)
    rig.engines[0].gate.set()
    await until(lambda: rig.states()[0] == ("a", ModelState.READY))
    assert await rig.ask("a") == 1
    said = [(state, message) for name, state, message in rig.changes.seen if name == "a"][-2:]
    assert said[0][0] == "unavailable"
    assert said[1] == ("ready", "what it ran has ended after all")
    assert rig.hung == ["a"]


async def test_a_model_that_hangs_can_be_unloaded(rig):
    await asyncio.gather(*await hang(rig), return_exceptions=True)
    await asyncio.wait_for(rig.fleet.unload("a"), PATIENCE_S)
    assert rig.states() == [("b", ModelState.READY)]
    assert not rig.engines[0].closed.is_set()
    assert await rig.ask("b") == 2


async def test_a_model_that_hangs_can_be_replaced(rig):
    await asyncio.gather(*await hang(rig), return_exceptions=True)
    await asyncio.wait_for(rig.fleet.replace(config("a")), PATIENCE_S)
    assert rig.states() == [("a", ModelState.READY), ("b", ModelState.READY)]
    assert await rig.ask("a") == 3


async def with_two_devices(rig: Rig) -> "tuple[Engine, Engine]":
    """Load a model "c" of two engines, and have one of them run a call that does not end."""
    await rig.fleet.load(config("c").model_copy(update={"hang_after_s": HANG_AFTER_S, "instances": 2}))
    pair = rig.engines[-2], rig.engines[-1]
    for engine in pair:
        engine.gate.clear()
    return pair


def faults(rig: Rig) -> list[str]:
    return [device.fault for device in rig.fleet.get("c").queue.devices]


async def test_a_device_that_hangs_is_taken_out_and_the_model_goes_on(rig, caplog):
    pair = await with_two_devices(rig)
    stuck = asyncio.create_task(rig.ask("c"))
    await until(lambda: any(engine.entered.is_set() for engine in pair))
    place = [engine.entered.is_set() for engine in pair].index(True)
    pair[1 - place].gate.set()
    # Of all callers, only the one whose image runs there is told.
    answers = await asyncio.gather(*(rig.ask("c") for _ in range(8)))
    with pytest.raises(ModelInterrupted, match="hangs on the device that ran this request"):
        await stuck
    assert set(answers) == {pair[1 - place].number}
    assert "what it runs has been running for" in faults(rig)[place]
    assert not faults(rig)[1 - place]
    assert rig.states()[-1] == ("c", ModelState.READY)
    assert (rig.hung, rig.ended) == ([], [])
    assert await rig.ask("c") == pair[1 - place].number
    assert f"model c: cpu#{place} hangs, and others go on" in caplog.text
    pair[place].gate.set()
    await until(lambda: faults(rig) == ["", ""])


async def test_a_model_whose_devices_are_all_out_is_unavailable_until_one_works(rig):
    pair = await with_two_devices(rig)
    for engine in pair:
        engine.gate.set()
    devices = rig.fleet.get("c").queue.batcher.devices
    for place in (0, 1):
        devices.take_out(place, "its runs fail")
    with pytest.raises(ModelInterrupted, match="fails on all of its devices") as raised:
        await rig.ask("c")
    assert raised.value.reason == "DEVICES_FAILED"
    await until(lambda: rig.states()[-1] == ("c", ModelState.UNAVAILABLE))
    devices.put_in(1)
    await until(lambda: rig.states()[-1] == ("c", ModelState.READY))
    assert await rig.ask("c") in {pair[0].number, pair[1].number}
    said = [(state, message) for name, state, message in rig.changes.seen if name == "c"][-2:]
    assert said == [("unavailable", "fails on all of its devices"), ("ready", "a device works again")]
