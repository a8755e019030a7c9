"""Loading what a request needs, once for all who wait for it, while others are answered."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import pytest_asyncio

from heatlens import PixelBox
from heatlens_server.cam.catalog import Method
from heatlens_server.engines.base import ImageResult, MapSpec, Target, TopK
from heatlens_server.errors import CompanionFailed, ModelLoadError, QueueFull, ServerDraining
from heatlens_server.imaging.preprocess import FittedImage
from heatlens_server.serving.lane import Lane

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
async def lane() -> AsyncIterator[Lane]:
    engine = Engine()
    with ThreadPoolExecutor(1) as preparers:
        made = Lane(engine, name="m", preparers=preparers, max_batch_size=4, max_delay_s=0.0, max_queue_length=4)
        yield made
        engine.gate.set()
        await until(lambda: not made._readiness.loading)
        assert await made.close(timeout_s=PATIENCE_S)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.001)


async def entering(lane: Lane, count: int, spec: MapSpec = NEEDY) -> list["asyncio.Task[None]"]:
    """Callers that wait while the load is inside of the engine."""
    tasks = [asyncio.create_task(lane.ensure(spec)) for _ in range(count)]
    await until(lambda: lane._engine.entered.is_set() and lane._readiness._waiting == count)
    return tasks


async def explain(lane: Lane, spec: MapSpec) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await lane.explain(lambda: IMAGE, TopK(1), spec, timeout_s=None)


async def test_nothing_is_done_where_nothing_is_needed(lane):
    coroutine = lane.ensure(PLAIN)
    with pytest.raises(StopIteration):  # it does not even wait
        coroutine.send(None)
    assert lane._engine.loads == []


async def test_all_wait_for_one_load_and_others_are_answered_meanwhile(lane):
    tasks = await entering(lane, 3)
    await explain(lane, PLAIN)
    assert not any(task.done() for task in tasks)
    lane._engine.gate.set()
    await asyncio.gather(*tasks)
    await lane.ensure(OTHER)
    assert lane._engine.loads == [NEEDY]


async def test_callers_that_leave_do_not_stop_the_load(lane):
    tasks = await entering(lane, 2)
    for task in tasks:
        task.cancel()
    assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))
    assert lane._readiness._waiting == 0
    assert lane._readiness.loading
    lane._engine.gate.set()
    await lane.ensure(NEEDY)
    assert lane._engine.loads == [NEEDY]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModelLoadError("weights file 'w.pth' cannot be read"), "weights file 'w.pth' cannot be read"),
        (ValueError("/secret/path"), "an unexpected error"),
        (SystemExit(3), "an unexpected error"),
    ],
)
async def test_a_failure_is_told_to_all_and_tried_again_by_the_next(lane, error, said):
    lane._engine.errors = [error]
    tasks = await entering(lane, 3)
    lane._engine.gate.set()
    raised = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(e, CompanionFailed) for e in raised)
    assert len({id(e) for e in raised}) == 3
    assert said in str(raised[0])
    assert "/secret" not in str(raised[0])
    await lane.ensure(NEEDY)
    assert lane._engine.loads == [NEEDY, NEEDY]


async def test_who_needs_something_else_waits_and_looks_again(lane):
    """A load for one spec is no load for another, where the engine says so."""
    lane._engine.ready = lambda spec: (
        spec in lane._engine.loads[:-1] or (spec in lane._engine.loads and lane._engine.loaded)
    )
    tasks = await entering(lane, 1)
    tasks.append(asyncio.create_task(lane.ensure(OTHER)))
    await until(lambda: lane._readiness._waiting == 2)
    lane._engine.gate.set()
    await asyncio.gather(*tasks)
    assert lane._engine.loads == [NEEDY, OTHER]


async def test_no_more_wait_for_a_load_than_may_wait_for_the_model(lane):
    tasks = await entering(lane, 4)
    with pytest.raises(QueueFull) as refused:
        await lane.ensure(NEEDY)
    assert refused.value.retry_after_s == 1.0
    lane._engine.gate.set()
    await asyncio.gather(*tasks)


async def test_closing_while_something_is_loaded_says_so(lane):
    tasks = await entering(lane, 1)
    assert not await lane.close(timeout_s=PATIENCE_S)
    assert lane._engine.closed == 1
    lane._engine.gate.set()
    await asyncio.gather(*tasks)


async def test_those_who_wait_for_a_load_can_be_told_to_go(lane):
    tasks = await entering(lane, 2)
    lane.give_up(ServerDraining("over"))
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(ended, ServerDraining)
    with pytest.raises(ServerDraining):
        await lane.ensure(NEEDY)
    assert lane._readiness.loading
    lane._engine.gate.set()
    await until(lambda: lane._engine.loaded)
