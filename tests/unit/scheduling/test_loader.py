"""Loading what a request needs, once for all callers that wait for it, while others are answered."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import pytest_asyncio

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import CompanionFailed, ModelLoadError, QueueFull, ServerDraining
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK
from heatlens_server.scheduling.model_queue import ModelQueue
from queue_engines import BATCHED, PATIENCE_S, BatchEngine, image, until

NEEDY = dataclasses.replace(BATCHED, method=Method.FULL_GRAD)
OTHER = dataclasses.replace(BATCHED, method=Method.LE_GRAD)


class LoadingEngine(BatchEngine):
    """Needs to load something for all but BATCHED, which takes until `may_load` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.may_load, self.in_load = threading.Event(), threading.Event()
        self.loaded = False
        self.loads: list[MapSpec] = []
        self.errors: list[BaseException] = []

    def is_loaded_for(self, spec: MapSpec) -> bool:
        return spec == BATCHED or self.loaded

    def load_for(self, spec: MapSpec) -> None:
        assert threading.current_thread().daemon
        assert threading.current_thread().name == "load-m"
        self.loads.append(spec)
        self.in_load.set()
        assert self.may_load.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.pop(0)
        self.loaded = True


@pytest.fixture
def engine() -> Iterator[LoadingEngine]:
    made = LoadingEngine()
    yield made
    made.may_load.set()


@pytest_asyncio.fixture
async def queue(engine: LoadingEngine) -> AsyncIterator[ModelQueue]:
    with ThreadPoolExecutor(1) as decoders:
        made = ModelQueue([engine], name="m", decoders=decoders, max_batch_size=4, max_delay_s=0.0, max_queue_length=4)
        yield made
        engine.may_load.set()
        await until(lambda: not any(thread.name == "load-m" for thread in threading.enumerate()))
        assert await made.close(timeout_s=PATIENCE_S)


async def entering(queue: ModelQueue, engine: LoadingEngine, count: int) -> list["asyncio.Task[None]"]:
    """Callers that wait while the load is inside of the engine."""
    tasks = [asyncio.create_task(queue.load_for(NEEDY)) for _ in range(count)]
    await asyncio.sleep(0)  # all wait
    await until(engine.in_load.is_set)
    return tasks


async def test_nothing_is_done_where_nothing_is_needed(queue, engine):
    coroutine = queue.load_for(BATCHED)
    with pytest.raises(StopIteration):  # it does not even wait
        coroutine.send(None)
    assert engine.loads == []


async def test_all_wait_for_one_load_and_others_are_answered_meanwhile(queue, engine):
    tasks = await entering(queue, engine, 3)
    await queue.submit(lambda: image(1), TopK(1), BATCHED, timeout_s=PATIENCE_S).result()
    assert not any(task.done() for task in tasks)
    engine.may_load.set()
    await asyncio.gather(*tasks)
    await queue.load_for(OTHER)
    assert engine.loads == [NEEDY]


async def test_callers_that_leave_do_not_stop_the_load(queue, engine):
    tasks = await entering(queue, engine, 2)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert not engine.loaded
    engine.may_load.set()
    await queue.load_for(NEEDY)
    assert engine.loads == [NEEDY]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelLoadError("weights file 'w.pth' cannot be read"), "weights file 'w.pth' cannot be read"),
        (ValueError("/secret/path"), "an unexpected error"),
        (SystemExit(3), "an unexpected error"),
    ],
)
async def test_a_failure_is_told_to_all_and_tried_again_by_the_next(queue, engine, error, said):
    engine.errors = [error]
    tasks = await entering(queue, engine, 3)
    engine.may_load.set()
    raised = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(e, CompanionFailed) for e in raised)
    assert len({id(e) for e in raised}) == 3
    assert said in str(raised[0])
    assert "/secret" not in str(raised[0])
    await queue.load_for(NEEDY)
    assert engine.loads == [NEEDY, NEEDY]


async def test_a_caller_that_needs_something_else_waits_and_looks_again(queue, engine):
    """A load for one spec is no load for another, where the engine says so."""
    engine.is_loaded_for = lambda spec: spec in engine.loads[:-1] or (spec in engine.loads and engine.loaded)
    tasks = await entering(queue, engine, 1)
    tasks.append(asyncio.create_task(queue.load_for(OTHER)))
    await asyncio.sleep(0)  # both wait
    engine.may_load.set()
    await asyncio.gather(*tasks)
    assert engine.loads == [NEEDY, OTHER]


async def test_no_more_wait_for_a_load_than_may_wait_for_the_model(queue, engine):
    tasks = await entering(queue, engine, 4)
    with pytest.raises(QueueFull) as refused:
        await queue.load_for(NEEDY)
    assert refused.value.retry_after_s == 1.0
    engine.may_load.set()
    await asyncio.gather(*tasks)


async def test_closing_while_something_is_loaded_says_so(queue, engine):
    tasks = await entering(queue, engine, 1)
    assert not await queue.close(timeout_s=PATIENCE_S)
    assert engine.closed == 1
    engine.may_load.set()
    await asyncio.gather(*tasks)


async def test_callers_that_wait_for_a_load_can_be_told_to_go(queue, engine):
    tasks = await entering(queue, engine, 2)
    queue.give_up(ServerDraining("over"))
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, ServerDraining)
    with pytest.raises(ServerDraining):
        await queue.load_for(NEEDY)
    assert not engine.loaded
    engine.may_load.set()
    await until(lambda: engine.loaded)
