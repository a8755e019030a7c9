"""An engine that answers at once, and another that takes over from it: real queues and threads, engines with gates."""

import asyncio
import threading

import pytest

from fleets import IMAGE, SPEC, closed, config, until
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.targets import TopK
from heatlens_server.fleet.fleet import ModelState


async def test_the_engine_that_follows_takes_over_and_what_began_is_finished(rig):
    rig.next_engine = "faster"
    rig.gates["a+"] = threading.Event()
    await rig.fleet.load(config("a"))
    (status,) = rig.fleet
    assert (status.state, status.next_engine) == (ModelState.READY, "faster")
    assert await rig.ask("a") == 1
    rig.engines[0].gate.clear()
    running = asyncio.create_task(rig.ask("a"))
    await until(rig.engines[0].entered.is_set)
    with rig.fleet.use("a") as used_by_a_stream:
        rig.gates["a+"].set()
        await until(lambda: rig.fleet.get("a").generation == 2)
        (status,) = rig.fleet
        assert (status.state, status.next_engine) == (ModelState.READY, "")
        assert await rig.ask("a") == 2
        rig.engines[0].gate.set()
        assert await running == 1
        explained = await used_by_a_stream.queue.submit(lambda: IMAGE, TopK(1), SPEC, timeout_s=None).result()
        assert explained.result.logits[0] == 1
        assert not rig.engines[0].closed.is_set()
    assert await closed(rig.engines[0])
    assert rig.ended == []
    assert [(state, message.rpartition("; ")[2]) for _, state, message in rig.changes.seen] == [
        ("loading", ""),
        ("ready", "faster takes over once the model is exported"),
        ("ready", "fake on cpu in fp32, layer layer"),
    ]


async def test_what_cannot_follow_leaves_what_serves(rig, caplog):
    rig.next_engine = "faster"
    rig.errors["a+"] = ModelLoadError("no graph")
    await rig.fleet.load(config("a"))
    await until(lambda: not next(iter(rig.fleet)).next_engine)
    assert await rig.ask("a") == 1
    assert "model a is run by torch, not by faster: no graph" in caplog.text


@pytest.mark.parametrize("way", ["unload", "replace", "close"])
async def test_what_was_to_follow_is_given_up_with_its_model(rig, way):
    rig.next_engine = "faster"
    rig.gates["a+"] = threading.Event()
    await rig.fleet.load(config("a"))
    if way == "unload":
        await rig.fleet.unload("a")
    elif way == "replace":
        await rig.fleet.replace(config("a"))
        assert await rig.ask("a") == 2
    else:
        rig.fleet.stop_loading()
    late = len(rig.engines)
    rig.gates["a+"].set()
    await until(lambda: len(rig.engines) > late)
    assert await closed(rig.engines[late])
    if way == "replace":
        assert await rig.ask("a") == 2
        assert rig.fleet.get("a").generation == 2


async def test_a_replacement_that_fails_leaves_what_was_to_follow(rig):
    rig.next_engine = "faster"
    rig.gates["a+"] = threading.Event()
    await rig.fleet.load(config("a"))
    rig.errors["a"] = ModelLoadError("no weights")
    with pytest.raises(ModelLoadError, match="no weights"):
        await rig.fleet.replace(config("a"))
    rig.gates["a+"].set()
    await until(lambda: rig.fleet.get("a").generation == 2)
    assert next(iter(rig.fleet)).next_engine == ""
