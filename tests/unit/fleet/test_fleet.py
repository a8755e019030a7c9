"""The set of models while it changes: real queues and threads, and an engine that answers at once or behind a gate."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest

from fleets import IMAGE, PATIENCE_S, PREPROCESS, SPEC, Engine, Rig, closed, config, until
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import (
    ConfigError,
    ModelFailed,
    ModelLoadError,
    ModelLoading,
    ModelNotFound,
    ModelUnloaded,
    ServerDraining,
)
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK
from heatlens_server.fleet.build import BuiltModel
from heatlens_server.fleet.fleet import Fleet, ModelState
from heatlens_server.scheduling.model_queue import ModelQueue

# Loading.


async def test_a_model_is_loading_and_then_answers(rig):
    rig.gates["a"] = threading.Event()
    loading = rig.fleet.load(config("a"))
    assert rig.states() == [("a", ModelState.LOADING)]
    with pytest.raises(ModelLoading) as raised:
        rig.fleet.get("a")
    assert raised.value.metadata == {"model": "a"}
    assert raised.value.retry_after_s > 0
    rig.gates["a"].set()
    await loading
    assert rig.states() == [("a", ModelState.READY)]
    assert await rig.ask("a") == 1
    assert rig.fleet.get("a").generation == 1
    assert rig.changes.seen == [("a", "loading", ""), ("a", "ready", "fake on cpu in fp32, layer layer")]
    assert rig.published == 2


async def test_order_is_kept_and_the_first_is_the_default(rig):
    rig.gates["a"] = threading.Event()
    assert rig.fleet.default == ""
    loads = [rig.fleet.load(config(name)) for name in "abc"]
    await asyncio.gather(*loads[1:])
    assert rig.states() == [("a", ModelState.LOADING), ("b", ModelState.READY), ("c", ModelState.READY)]
    with pytest.raises(ModelLoading, match="'a'"):
        rig.fleet.get("")
    rig.gates["a"].set()
    await loads[0]
    assert rig.fleet.get("") is rig.fleet.get("a")


async def test_a_default_that_is_named_may_be_any_or_gone():
    with ThreadPoolExecutor(1) as decoders:
        rig = Rig(decoders, default="b")
        await asyncio.gather(*(rig.fleet.load(config(name)) for name in "ab"))
        assert rig.fleet.get("") is rig.fleet.get("b")
        await rig.fleet.unload("b")
        assert rig.fleet.default == "b"
        with pytest.raises(ModelNotFound):
            rig.fleet.get("")
        assert await rig.fleet.close()


@pytest.mark.parametrize("name", ["d", "A", " a", "a\n", "x" * 100_000])
async def test_unknown_names(rig, name):
    await asyncio.gather(*(rig.fleet.load(config(known)) for known in "ab"))
    with pytest.raises(ModelNotFound) as raised:
        rig.fleet.get(name)
    assert raised.value.metadata == {"model": name[:80], "available": "a,b"}
    assert len(raised.value.message) < 200
    for change in (rig.fleet.unload(name), rig.fleet.replace(config("d"))):
        with pytest.raises(ModelNotFound):
            await change


@pytest.mark.parametrize(
    ("error", "shown", "told"),
    [
        (ModelLoadError("no weights"), "no weights", ""),
        (
            ValueError("/secret/path"),
            "an unexpected error while loading; the server's log has it",
            "; ValueError: /secret/path",
        ),
        (SystemExit(3), "the model's code raised SystemExit", "; SystemExit: 3"),
    ],
)
async def test_a_model_that_fails_says_why_harms_no_other_and_can_be_loaded_again(rig, error, shown, told):
    rig.errors["a"] = error
    await asyncio.gather(*(rig.fleet.load(config(name)) for name in "ab"))
    assert rig.states() == [("a", ModelState.FAILED), ("b", ModelState.READY)]
    with pytest.raises(ModelFailed, match=shown) as raised:
        rig.fleet.get("a")
    assert raised.value.retry_after_s is None
    assert raised.value.message.endswith(shown)
    (said,) = [message for model, state, message in rig.changes.seen if (model, state) == ("a", "failed")]
    # The operator reads the cause, and where it was raised: here in the rig.
    assert said.startswith(shown + told)
    # The traceback is for what nobody expected.
    assert [repr(fault.__cause__) for fault in rig.changes.faults] == [repr(error)] * isinstance(error, ValueError)
    assert await rig.ask("b") == 1
    del rig.errors["a"]
    await rig.fleet.load(config("a"))
    assert rig.states() == [("a", ModelState.READY), ("b", ModelState.READY)]
    assert await rig.ask("a") == 2


async def test_a_queue_that_cannot_be_made_fails_the_model_and_closes_its_engine():
    engine = Engine(1)

    def refuse(config: ModelConfig, engine: Engine) -> ModelQueue:
        raise RuntimeError("can't start new thread")

    fleet = Fleet(build=lambda _: BuiltModel(engine, PREPROCESS, "", (), Method.GRAD_CAM), make_queue=refuse)
    await fleet.load(config("a"))
    with pytest.raises(ModelFailed, match="unexpected error"):
        fleet.get("a")
    assert await closed(engine)


async def test_a_name_that_is_taken_is_refused(rig):
    rig.gates["a"] = threading.Event()
    loading = rig.fleet.load(config("a"))
    with pytest.raises(ConfigError, match="'a' already"):
        rig.fleet.load(config("a"))
    with pytest.raises(ConfigError, match="being loaded"):
        await rig.fleet.replace(config("a"))
    rig.gates["a"].set()
    await loading
    with pytest.raises(ConfigError, match="'a' already"):
        rig.fleet.load(config("a"))
    assert len(rig.engines) == 1


async def test_limits_are_those_of_the_models_that_there_are(rig):
    assert (rig.fleet.max_batch_size, rig.fleet.max_delay_s) == (0, 0.0)
    await rig.fleet.load(config("a", max_batch_size=4, max_delay_ms=8))
    await rig.fleet.load(config("b", max_batch_size=32, max_delay_ms=1))
    assert (rig.fleet.max_batch_size, rig.fleet.max_delay_s) == (32, 0.008)
    await rig.fleet.replace(config("b", max_batch_size=2))
    await rig.fleet.unload("a")
    assert (rig.fleet.max_batch_size, rig.fleet.max_delay_s) == (2, 0.002)


# Unloading.


async def test_an_unloaded_model_answers_what_waits_finishes_what_runs_and_is_gone(rig):
    await asyncio.gather(rig.fleet.load(config("a", max_batch_size=1)), rig.fleet.load(config("b")))
    model = rig.fleet.get("a")
    engine = next(engine for engine in rig.engines if engine.info is model.capabilities)
    engine.gate.clear()
    calls = [asyncio.create_task(rig.ask("a")) for _ in range(5)]
    assert await asyncio.to_thread(engine.entered.wait, PATIENCE_S)
    # One runs, and at most one more is stacked for the time after it.
    await until(lambda: len(model.queue.batcher) == 3)
    unloading = asyncio.create_task(rig.fleet.unload("a"))
    await until(lambda: sum(call.done() for call in calls) == 3)
    with pytest.raises(ModelNotFound):
        rig.fleet.get("a")
    with pytest.raises(ModelUnloaded):
        model.queue.submit(lambda: IMAGE, TopK(1), SPEC, timeout_s=None)
    assert not engine.closed.is_set()
    assert not unloading.done()
    engine.gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers.count(engine.number) == 2
    assert [str(answer) for answer in answers if isinstance(answer, ModelUnloaded)] == ["model 'a' was unloaded"] * 3
    await unloading
    assert engine.closed.is_set()
    assert rig.states() == [("b", ModelState.READY)]
    assert rig.changes.seen[-1] == ("a", "unloaded", "")
    ((ended, error),) = rig.ended
    assert ended is model
    assert isinstance(error, ModelUnloaded)


async def test_an_unloaded_models_memory_is_free(rig):
    await rig.fleet.load(config("a"))
    assert await rig.ask("a") == 1
    engine = weakref.ref(rig.engines.pop())
    await rig.fleet.unload("a")
    rig.ended.clear()
    await until(lambda: gc.collect() is not None and engine() is None)


async def test_a_model_that_is_unloaded_while_it_loads_never_serves(rig):
    gate = rig.gates["a"] = threading.Event()
    loading = rig.fleet.load(config("a"))
    await rig.fleet.unload("a")
    await loading
    assert rig.states() == []
    # The name is free at once, while the first thread is still at it.
    del rig.gates["a"]
    await rig.fleet.load(config("a"))
    assert await rig.ask("a") == 1
    gate.set()
    await until(lambda: len(rig.engines) == 2)
    assert await closed(rig.engines[1])
    assert await rig.ask("a") == 1


async def test_a_model_is_unloaded_between_the_end_of_its_build_and_its_service(rig):
    gate = rig.gates["a"] = threading.Event()
    loading = rig.fleet.load(config("a"))
    await asyncio.sleep(0)
    gate.set()
    while not rig.engines:
        pass
    # The loop has the result in its inbox, and the task has not seen it.
    await rig.fleet.unload("a")
    await loading
    assert rig.states() == []
    assert await closed(rig.engines[0])


async def test_a_failed_model_can_be_unloaded(rig):
    rig.errors["a"] = ModelLoadError("no")
    await rig.fleet.load(config("a"))
    await rig.fleet.unload("a")
    assert rig.states() == []


# Replacing.


async def test_no_call_is_lost_while_models_are_replaced(rig):
    await rig.fleet.load(config("a", max_batch_size=2))
    answers: list[int] = []
    over = False

    async def keep_asking() -> None:
        while not over:
            answers.append(await rig.ask("a"))

    callers = [asyncio.create_task(keep_asking()) for _ in range(8)]
    for generation in range(2, 6):
        enough = len(answers) + 20
        await until(lambda enough=enough: len(answers) >= enough)
        await rig.fleet.replace(config("a", max_batch_size=2))
        assert rig.fleet.get("a").generation == generation
        assert await rig.ask("a") == generation
    over = True
    await asyncio.gather(*callers)
    assert set(answers) == {1, 2, 3, 4, 5}
    for engine in rig.engines[:-1]:
        assert await closed(engine)
    assert not rig.engines[-1].closed.is_set()
    assert [(model.generation, error.reason) for model, error in rig.replaced] == [
        (generation, "MODEL_REPLACED") for generation in (1, 2, 3, 4)
    ]
    assert rig.ended == []
    assert {state for _, state, _ in rig.changes.seen} == {"loading", "ready"}


async def test_a_call_that_began_with_the_old_model_is_finished_by_it(rig):
    await rig.fleet.load(config("a"))
    old = rig.engines[0]
    with rig.fleet.use("a") as model:
        # As a call that waits for torch to be loaded beside the export: it is in no queue yet.
        await rig.fleet.replace(config("a"))
        assert await rig.ask("a") == 2
        explained = await model.queue.submit(lambda: IMAGE, TopK(1), SPEC, timeout_s=None).result()
        assert explained.result.logits[0] == 1
        assert not old.closed.is_set()
    assert await closed(old)


async def test_streams_of_a_model_that_was_replaced_end_when_their_time_is_over():
    with ThreadPoolExecutor(1) as decoders:
        rig = Rig(decoders, replaced_streams_s=0.0)
        await rig.fleet.load(config("a"))
        with rig.fleet.use("a") as model:
            await rig.fleet.replace(config("a"))
            await until(lambda: rig.ended)
            assert not rig.engines[0].closed.is_set()
        ((ended, error),) = rig.ended
        assert (ended, error.reason, error.retry_after_s) == (model, "MODEL_REPLACED", 0.0)
        assert await closed(rig.engines[0])
        assert await rig.fleet.close()


async def test_the_old_model_serves_while_the_new_one_loads_and_goes_on_if_that_fails(rig):
    await rig.fleet.load(config("a"))
    gate = rig.gates["a"] = threading.Event()
    rig.errors["a"] = ModelLoadError("no weights")
    replacing = asyncio.create_task(rig.fleet.replace(config("a", max_batch_size=99)))
    await until(lambda: len([thread for thread in threading.enumerate() if thread.name == "load-a"]) == 1)
    assert await rig.ask("a") == 1
    with pytest.raises(ConfigError, match="being loaded or replaced"):
        await rig.fleet.replace(config("a"))
    gate.set()
    with pytest.raises(ModelLoadError, match="no weights"):
        await replacing
    assert await rig.ask("a") == 1
    assert rig.fleet.max_batch_size != 99
    assert [state for _, state, _ in rig.changes.seen] == ["loading", "ready"]
    del rig.errors["a"]
    await rig.fleet.replace(config("a"))
    assert await rig.ask("a") == 2


async def test_a_failed_model_can_be_replaced(rig):
    rig.errors["a"] = ModelLoadError("no")
    await rig.fleet.load(config("a"))
    del rig.errors["a"]
    await rig.fleet.replace(config("a"))
    assert await rig.ask("a") == 1


async def test_a_model_that_is_unloaded_while_it_is_replaced_is_gone_with_both(rig):
    await rig.fleet.load(config("a"))
    gate = rig.gates["a"] = threading.Event()
    replacing = asyncio.create_task(rig.fleet.replace(config("a")))
    await asyncio.sleep(0)
    await rig.fleet.unload("a")
    with pytest.raises(ModelUnloaded):
        await replacing
    assert rig.engines[0].closed.is_set()
    gate.set()
    await until(lambda: len(rig.engines) == 2)
    assert await closed(rig.engines[1])
    assert rig.states() == []


async def test_a_replacement_that_nobody_waits_for_any_more_is_closed(rig):
    await rig.fleet.load(config("a"))
    gate = rig.gates["a"] = threading.Event()
    replacing = asyncio.create_task(rig.fleet.replace(config("a")))
    await asyncio.sleep(0)
    replacing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await replacing
    gate.set()
    await until(lambda: len(rig.engines) == 2)
    assert await closed(rig.engines[1])
    assert await rig.ask("a") == 1
    del rig.gates["a"]
    await rig.fleet.replace(config("a"))
    assert await rig.ask("a") == 3


# The end.


async def test_a_fleet_that_closes_finishes_its_calls_and_says_if_a_thread_still_loads(rig):
    gate = rig.gates["b"] = threading.Event()
    loads = [rig.fleet.load(config(name)) for name in "ab"]
    await loads[0]
    rig.engines[0].gate.clear()
    call = asyncio.create_task(rig.ask("a"))
    assert await asyncio.to_thread(rig.engines[0].entered.wait, PATIENCE_S)
    closing = asyncio.create_task(rig.fleet.close())
    await loads[1]
    assert rig.states() == [("a", ModelState.READY), ("b", ModelState.LOADING)]
    for refused in (rig.fleet.load, rig.fleet.replace):
        with pytest.raises(ServerDraining):
            await refused(config("a"))
    rig.engines[0].gate.set()
    assert await call == 1
    assert await closing is False
    assert rig.engines[0].closed.is_set()
    gate.set()
    await until(lambda: len(rig.engines) == 2)
    assert await closed(rig.engines[1])
    await until(lambda: not any(thread.name == "load-b" for thread in threading.enumerate()))
    assert await rig.fleet.close()


async def test_what_waits_is_given_up_also_at_a_model_that_was_replaced(rig):
    await rig.fleet.load(config("a", max_batch_size=1))
    old = rig.engines[0]
    old.gate.clear()
    calls = [asyncio.create_task(rig.ask("a")) for _ in range(5)]
    assert await asyncio.to_thread(old.entered.wait, PATIENCE_S)
    queue = rig.fleet.get("a").queue
    await until(lambda: len(queue.batcher) == 3)
    await rig.fleet.replace(config("a"))
    rig.fleet.give_up(ServerDraining())
    await until(lambda: sum(call.done() for call in calls) == 3)
    old.gate.set()
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers.count(1) == 2
    assert sum(isinstance(answer, ServerDraining) for answer in answers) == 3
    assert await rig.fleet.close()
    assert old.closed.is_set()
