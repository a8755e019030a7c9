"""Loading what a request needs, once for all who wait for it, while others are answered."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import CompanionFailed, ModelLoadError, QueueFull, ServerDraining
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.scheduling.model_queue import ModelQueue

PLAIN = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
NEEDY = MapSpec(Method.FULL_GRAD, ("layer",), upsample=False)
OTHER = MapSpec(Method.LE_GRAD, ("layer",), upsample=False)
PATIENCE_S = 20
IMAGE = FittedImage(
    pixels=np.zeros((2, 2, 3), np.uint8), region=PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2
)


class Engine:
    """Needs to load something for all but PLAIN, which takes until the gate is open."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.loaded = False
        self.loads: list[MapSpec] = []
        self.errors: list[BaseException] = []
        self.closed = 0

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        one = np.zeros(1, np.float32)
        return [ImageResult(one, (0,), np.zeros((1, 1, 1), np.float32), one, one) for _ in images]

    def ready(self, spec: MapSpec) -> bool:
        return spec == PLAIN or self.loaded

    def prepare(self, spec: MapSpec) -> None:
        assert threading.current_thread().daemon
        self.loads.append(spec)
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.errors:
            raise self.errors.pop(0)
        self.loaded = True

    def close(self) -> None:
        self.closed += 1


@pytest_asyncio.fixture
async def queue() -> AsyncIterator[ModelQueue]:
    engine = Engine()
    with ThreadPoolExecutor(1) as preparers:
        made = ModelQueue(engine, name="m", preparers=preparers, max_batch_size=4, max_delay_s=0.0, max_queue_length=4)
        yield made
        engine.gate.set()
        await until(lambda: not made._readiness.loading)
        assert await made.close(timeout_s=PATIENCE_S)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.001)


async def entering(queue: ModelQueue, count: int, spec: MapSpec = NEEDY) -> list["asyncio.Task[None]"]:
    """Callers that wait while the load is inside of the engine."""
    tasks = [asyncio.create_task(queue.ensure(spec)) for _ in range(count)]
    await until(lambda: queue._engine.entered.is_set() and queue._readiness._waiting == count)
    return tasks


async def explain(queue: ModelQueue, spec: MapSpec) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await queue.explain(lambda: IMAGE, TopK(1), spec, timeout_s=None)


async def test_nothing_is_done_where_nothing_is_needed(queue):
    coroutine = queue.ensure(PLAIN)
    with pytest.raises(StopIteration):  # it does not even wait
        coroutine.send(None)
    assert queue._engine.loads == []


async def test_all_wait_for_one_load_and_others_are_answered_meanwhile(queue):
    tasks = await entering(queue, 3)
    await explain(queue, PLAIN)
    assert not any(task.done() for task in tasks)
    queue._engine.gate.set()
    await asyncio.gather(*tasks)
    await queue.ensure(OTHER)
    assert queue._engine.loads == [NEEDY]


async def test_callers_that_leave_do_not_stop_the_load(queue):
    tasks = await entering(queue, 2)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert queue._readiness._waiting == 0
    assert queue._readiness.loading
    queue._engine.gate.set()
    await queue.ensure(NEEDY)
    assert queue._engine.loads == [NEEDY]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelLoadError("weights file 'w.pth' cannot be read"), "weights file 'w.pth' cannot be read"),
        (ValueError("/secret/path"), "an unexpected error"),
        (SystemExit(3), "an unexpected error"),
    ],
)
async def test_a_failure_is_told_to_all_and_tried_again_by_the_next(queue, error, said):
    queue._engine.errors = [error]
    tasks = await entering(queue, 3)
    queue._engine.gate.set()
    raised = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(e, CompanionFailed) for e in raised)
    assert len({id(e) for e in raised}) == 3
    assert said in str(raised[0])
    assert "/secret" not in str(raised[0])
    await queue.ensure(NEEDY)
    assert queue._engine.loads == [NEEDY, NEEDY]


async def test_who_needs_something_else_waits_and_looks_again(queue):
    """A load for one spec is no load for another, where the engine says so."""
    queue._engine.ready = lambda spec: (
        spec in queue._engine.loads[:-1] or (spec in queue._engine.loads and queue._engine.loaded)
    )
    tasks = await entering(queue, 1)
    tasks.append(asyncio.create_task(queue.ensure(OTHER)))
    await until(lambda: queue._readiness._waiting == 2)
    queue._engine.gate.set()
    await asyncio.gather(*tasks)
    assert queue._engine.loads == [NEEDY, OTHER]


async def test_no_more_wait_for_a_load_than_may_wait_for_the_model(queue):
    tasks = await entering(queue, 4)
    with pytest.raises(QueueFull) as refused:
        await queue.ensure(NEEDY)
    assert refused.value.retry_after_s == 1.0
    queue._engine.gate.set()
    await asyncio.gather(*tasks)


async def test_closing_while_something_is_loaded_says_so(queue):
    tasks = await entering(queue, 1)
    assert not await queue.close(timeout_s=PATIENCE_S)
    assert queue._engine.closed == 1
    queue._engine.gate.set()
    await asyncio.gather(*tasks)


async def test_those_who_wait_for_a_load_can_be_told_to_go(queue):
    tasks = await entering(queue, 2)
    queue.give_up(ServerDraining("over"))
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, ServerDraining)
    with pytest.raises(ServerDraining):
        await queue.ensure(NEEDY)
    assert queue._readiness.loading
    queue._engine.gate.set()
    await until(lambda: queue._engine.loaded)
