"""Engines of one model beside each other: one on each of its devices, or several on one, which share its weights."""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np

from heatlens_server.config import ModelConfig
from heatlens_server.core.arrays import ImageArray
from heatlens_server.core.cores import usable_cores
from heatlens_server.core.engine import Capabilities, SteppingEngine
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.warm_up import run_trial, trial_shape, warm_up

_log = logging.getLogger(__name__)

_MOST_MEASURED = 8
"""The most engines that "auto" makes."""

_MEASURED_S = 0.4
"""How long each of the two is measured, in seconds, if one run takes no longer."""

_MEASURED_RUN_S = 0.2
"""How long one run of what is measured takes at most, in seconds, if an image takes no longer."""

_MEASURED_IMAGES = 4
_MIN_GAIN = 1.1
"""How many times as much several engines must explain: an image that comes alone takes longer with one thread."""


def on_all_devices(config: ModelConfig, build: Callable[[ModelConfig], BuiltModel]) -> BuiltModel:
    """Load a model on each of its devices, with as many engines as it is to have there.

    Args:
        config: the model.
        build: loads it on the one device that it is told.

    Raises:
        ModelLoadError: as `build`; or the model is run otherwise on another device.
    """
    first, *others = config.devices
    built = _with_instances(build(_on(config, first)), config)
    try:
        for device in others:
            one = _with_instances(build(_on(config, device)), config)
            built = replace(built, others=(*built.others, *one.engines))
            _check_alike(built.engine.info, one.engine.info)
    except BaseException:
        built.close()
        raise
    return built


def _check_alike(told: Capabilities, found: Capabilities) -> None:
    """Check that what clients are told of one device holds for another.

    Raises:
        ModelLoadError: it does not.
    """
    if replace(found, device=told.device) != told:
        raise ModelLoadError(
            f"device: {told.engine_name} runs the model on {told.device}, and {found.engine_name} on {found.device}, "
            "which differ in methods, layers or options: engine and provider choose one for both"
        )


def _on(config: ModelConfig, device: str) -> ModelConfig:
    return config.model_copy(update={"device": device, "instances": 1})


def _with_instances(built: BuiltModel, config: ModelConfig) -> BuiltModel:
    """Make as many engines of a model as it is to have on one device; on a CPU they divide its cores."""
    is_on_cpu, cores = built.engine.info.device == "cpu", usable_cores()
    try:
        if config.instances != "auto":
            several = _several(built, config, config.instances, threads=cores if is_on_cpu else None)
            if config.instances > 1:
                each = f", with {_share(cores, config.instances)} of {cores} cores each" if is_on_cpu else ""
                _log.info("model %s: %d engines on %s%s", config.name, config.instances, built.engine.info.device, each)
            return several
        if not is_on_cpu or cores == 1:
            return built
        return _best(built, config, cores)
    except BaseException:
        built.close()
        raise


def _several(built: BuiltModel, config: ModelConfig, count: int, *, threads: int | None) -> BuiltModel:
    """Make several engines of one.

    Args:
        built: with one engine.
        config: the model.
        count: how many.
        threads: of a CPU, which they divide; None on other devices.
    """
    if count == 1:
        return built
    others: list[SteppingEngine] = []
    try:
        if threads is not None:
            built.engine.use_threads(_share(threads, count))
        others += (built.engine.another() for _ in range(count - 1))
        for engine in (built.engine, *others):
            warm_up(engine, config, built.method)
    except BaseException:
        for engine in others:
            engine.close()
        raise
    return replace(built, others=tuple(others))


def _share(cores: int, count: int) -> int:
    return max(1, cores // count)


def _best(built: BuiltModel, config: ModelConfig, cores: int) -> BuiltModel:
    """Choose between one engine on all cores and one on each, by how many images a second they explain."""
    count = min(cores, _MOST_MEASURED)
    image = np.zeros((1, *trial_shape(built.engine.info)), np.uint8)
    image_s = 1 / _images_per_s([built.engine], image, built.method, seconds=0.0)
    most = 1 if built.engine.info.runs_one_by_one else min(_MEASURED_IMAGES, config.batching.max_batch_size)
    images = np.repeat(image, max(1, min(most, int(_MEASURED_RUN_S / image_s))), axis=0)
    one = _images_per_s([built.engine], images, built.method, seconds=_MEASURED_S)
    several = _several(built, config, count, threads=cores)
    try:
        found = _images_per_s(several.engines, images, built.method, seconds=_MEASURED_S)
    except BaseException:
        several.close()
        raise
    is_better = found >= _MIN_GAIN * one
    said = (
        f"{count if is_better else 1} of {count} engines run on the CPU: one on all cores explains {one:.1f} images a "
        f"second, and {count} with {_share(cores, count)} of {cores} cores each explain {found:.1f}, in batches of "
        f"{len(images)}; instances overrides that."
    )
    if not is_better:
        for engine in several.others:
            engine.close()
        built.engine.use_threads(None)
        warm_up(built.engine, config, built.method)
        several = built
    return replace(several, assumptions=(*built.assumptions, said))


def _images_per_s(engines: Sequence[SteppingEngine], images: ImageArray, method: Method, *, seconds: float) -> float:
    """How many images a second engines explain, each on a thread of its own and at least once."""

    def run(engine: SteppingEngine) -> int:
        count = 0
        start.wait()
        while not count or time.perf_counter() < end:
            run_trial(engine, images, method)
            count += 1
        return count

    # Whoever comes last lets all begin, each on its thread.
    start = Barrier(len(engines))
    with ThreadPoolExecutor(len(engines)) as threads:
        began = time.perf_counter()
        end = began + seconds
        runs = sum(threads.map(run, engines))
        return runs * len(images) / (time.perf_counter() - began)
