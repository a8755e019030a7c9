"""Fleets for tests: of models that are there at once, and of engines whose building and running the test holds up."""

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np

from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.events import Observer
from heatlens_server.core.geometry import PixelBox
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import FittedImage, Interpolation, PreprocessSpec
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import Target, TopK
from heatlens_server.fleet.build import BuiltModel
from heatlens_server.fleet.fleet import Fleet, ModelState
from heatlens_server.fleet.served_model import ServedModel
from heatlens_server.scheduling.model_queue import ModelQueue

PATIENCE_S = 20
SPEC = MapSpec(Method.GRAD_CAM, ("layer",), upsample=False)
IMAGE = FittedImage(np.zeros((2, 2, 3), np.uint8), PixelBox(0, 0, 2, 2), source_width_px=2, source_height_px=2)
PREPROCESS = PreprocessSpec(2, (2, 2), (0.5,) * 3, (0.5,) * 3, Interpolation.BILINEAR)


class Idle:
    """The queue of a model that nothing is asked of."""

    devices = ()


async def fleet_of(*models: ServedModel) -> Fleet:
    """A fleet in which each model is READY, with the queue that it has, if any."""
    named = {model.name: model for model in models}

    def built(config: ModelConfig) -> BuiltModel:
        model = named[config.name]
        engine = SimpleNamespace(info=model.capabilities, close=lambda: None)
        return BuiltModel(engine, model.preprocess, model.version, model.labels, model.default_method)

    fleet = Fleet(build=built, make_queue=lambda config, _engines: named[config.name].queue or Idle())
    for model in models:
        batching = {"max_batch_size": model.max_batch_size, "max_delay_ms": model.max_delay_s * 1e3}
        await fleet.load(ModelConfig(name=model.name, source="embedded:efficientnet_lite0", batching=batching))
    return fleet


class Engine:
    """Answers with its own number once its gate is open."""

    def __init__(self, number: int) -> None:
        self.info = Capabilities("fake", "cpu", "fp32", 2, 2, 1, (Method.GRAD_CAM,), ("layer",), weights_bytes=100)
        self.number = number
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = threading.Event()

    def explain(self, images: np.ndarray, targets: Sequence[Target], spec: MapSpec) -> list[ImageResult]:
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        assert not self.closed.is_set()
        one = np.zeros(1, np.float32)
        logits = np.array([self.number], np.float32)
        return [ImageResult(logits, (0,), np.zeros((1, 1, 1), np.float32), one, one) for _ in targets]

    def is_loaded_for(self, spec: MapSpec) -> bool:
        return True

    def close(self) -> None:
        self.closed.set()


class Changes(Observer):
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.faults: list[Exception] = []

    def model_changed(
        self, *, model: str, version: str = "", state: str, message: str, fault: Exception | None = None
    ) -> None:
        self.seen.append((model, state, message))
        if fault is not None:
            self.faults.append(fault)


class Rig:
    """A fleet, the engines that it made, and ways to hold up or fail a build."""

    def __init__(
        self,
        decoders: ThreadPoolExecutor,
        *,
        default: str = "",
        replaced_streams_s: float = 60.0,
        budget_bytes: int | None = None,
    ) -> None:
        self.engines: list[Engine] = []
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, BaseException] = {}
        self.changes = Changes()
        self.published = 0
        # Of models whose streams all end; and of those whose streams may ask for it.
        self.ended: list[tuple[object, Exception]] = []
        self.replaced: list[tuple[object, Exception]] = []
        self.next_engine = ""
        self.now_s = 0.0
        self.fleet = Fleet(
            build=self.build,
            build_at_once=lambda config: dataclasses.replace(self.build(config), next_engine=self.next_engine),
            build_next=self.build_next,
            make_queue=lambda config, engines: ModelQueue(
                engines,
                name=config.name,
                decoders=decoders,
                max_batch_size=config.batching.max_batch_size,
                max_delay_s=0.0,
                max_queue_length=64,
            ),
            default=default,
            observer=self.changes,
            publish=self.publish,
            end_streams=self.end_streams,
            replaced_streams_s=replaced_streams_s,
            memory_budget_bytes=None if budget_bytes is None else {"cpu": budget_bytes},
            clock=lambda: self.now_s,
        )

    def build(self, config: ModelConfig) -> BuiltModel:
        if config.name in self.gates:
            assert self.gates[config.name].wait(PATIENCE_S)
        if config.name in self.errors:
            raise self.errors[config.name]
        count = config.instances if isinstance(config.instances, int) else 1
        made = [Engine(len(self.engines) + 1 + i) for i in range(count)]
        self.engines += made
        return BuiltModel(made[0], PREPROCESS, config.version, (), Method.GRAD_CAM, others=tuple(made[1:]))

    def build_next(self, config: ModelConfig) -> BuiltModel:
        """As `build`, by gates and errors of the name and "+"."""
        return self.build(config.model_copy(update={"name": f"{config.name}+"}))

    def end_streams(self, model: ServedModel, error: Exception, *, only_if_asked: bool = False) -> None:
        (self.replaced if only_if_asked else self.ended).append((model, error))

    async def publish(self) -> None:
        self.published += 1

    async def ask(self, name: str) -> int:
        """The number of the engine that answers one call."""
        await self.fleet.idle.awake(name)
        with self.fleet.use(name) as model:
            explained = await model.queue.submit(lambda: IMAGE, TopK(1), SPEC, timeout_s=None).result()
        return int(explained.result.logits[0])

    def states(self) -> list[tuple[str, ModelState]]:
        return [(status.name, status.state) for status in self.fleet]


def config(name: str, **batching: float) -> ModelConfig:
    return ModelConfig(name=name, source="embedded:efficientnet_lite0", batching=batching)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what is waited for is in other threads
            await asyncio.sleep(0.002)


async def closed(engine: Engine) -> bool:
    return await asyncio.to_thread(engine.closed.wait, PATIENCE_S)
