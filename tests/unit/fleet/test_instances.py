"""Engines of one model beside each other: how many are made, what they share, and what "auto" chooses."""

import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from fleets import PREPROCESS
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Capabilities, MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.results import ImageResult
from heatlens_server.fleet import instances
from heatlens_server.fleet.built_model import BuiltModel
from heatlens_server.fleet.instances import on_all_devices
from heatlens_server.fleet.warm_up import try_out

INFO = Capabilities("fake", "cpu", "fp32", 2, 2, 1, (Method.GRAD_CAM,), ("layer",))


class Made:
    """An engine that takes `seconds(threads)` of a clock that all engines have, for each image.

    Attributes:
        threads: what it was told to use; None for all.
        closed: whether it is.
    """

    def __init__(self, info: Capabilities, fleet: "Engines") -> None:
        self.info, self.fleet = info, fleet
        self.threads: int | None = None
        self.closed = False
        fleet.made.append(self)

    def explain(self, images: np.ndarray, targets: object, _spec: object) -> list[ImageResult]:
        assert not self.closed
        self.fleet.spend(len(images) * self.fleet.image_s[self.threads])
        one = np.zeros(1, np.float32)
        return [ImageResult(one, (0,), np.zeros((1, 1, 1), np.float32), one, one) for _ in targets]

    def use_threads(self, count: int | None) -> None:
        self.threads = count

    def another(self) -> "Made":
        if len(self.fleet.made) == self.fleet.most:
            raise ModelLoadError("one too many")
        made = Made(self.info, self.fleet)
        made.threads = self.threads
        return made

    def close(self) -> None:
        self.closed = True


class Engines:
    """Builds models of `Made`, and is the clock of what they run: a thread's time passes beside the others'."""

    def __init__(self) -> None:
        self.made: list[Made] = []
        self.image_s: dict[int | None, float] = dict.fromkeys((None, 1, 2), 0.01)
        self.most = 99
        self.seen: list[ModelConfig] = []
        self.info: dict[str, Capabilities] = {}
        self._local = threading.local()
        self._lock = threading.Lock()
        self._now = self._began = 0.0

    def build(self, config: ModelConfig) -> BuiltModel:
        self.seen.append(config)
        (device,) = config.devices
        info = self.info.get(device, dataclasses.replace(INFO, device="cpu" if device == "auto" else device))
        return BuiltModel(Made(info, self), PREPROCESS, "1", (), Method.GRAD_CAM)

    def spend(self, seconds: float) -> None:
        self._local.now = self.now() + seconds
        with self._lock:
            self._now = max(self._now, self._local.now)

    def now(self) -> float:
        if threading.current_thread() is threading.main_thread():
            self._began = self._now
            return self._now
        # The others' time begins when the main thread last looked.
        return getattr(self._local, "now", self._began)


@pytest.fixture
def engines(monkeypatch) -> Engines:
    """On a machine of four cores."""
    made = Engines()
    monkeypatch.setattr(instances, "usable_cores", lambda: 4)
    monkeypatch.setattr(instances, "time", SimpleNamespace(perf_counter=made.now))
    return made


def config(**keys: object) -> ModelConfig:
    return ModelConfig(name="m", source="embedded:efficientnet_lite0", **keys)


def test_one_engine_is_left_as_it_is(engines):
    built = on_all_devices(config(), engines.build)
    assert built.engines == tuple(engines.made)
    assert [engine.threads for engine in engines.made] == [None]


def test_instances_on_a_cpu_divide_its_cores(engines, caplog):
    caplog.set_level("INFO")
    built = on_all_devices(config(instances=2), engines.build)
    assert built.engines == tuple(engines.made)
    assert [engine.threads for engine in engines.made] == [2, 2]
    assert "2 engines on cpu, with 2 of 4 cores each" in caplog.text


def test_there_may_be_more_instances_than_cores(engines):
    built = on_all_devices(config(instances=6), engines.build)
    assert [engine.threads for engine in built.engines] == [1] * 6


def test_a_list_of_devices_has_an_engine_on_each_and_instances_are_for_each(engines):
    built = on_all_devices(config(device=["cuda:0", "cuda:1"], instances=2), engines.build)
    assert [engine.info.device for engine in built.engines] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert [engine.threads for engine in built.engines] == [None] * 4
    assert [(one.device, one.instances) for one in engines.seen] == [("cuda:0", 1), ("cuda:1", 1)]


def test_devices_that_offer_different_things_are_refused_and_closed(engines):
    engines.info["cuda:0"] = dataclasses.replace(INFO, device="cuda:0", engine_name="other")
    with pytest.raises(ModelLoadError, match="device: fake runs the model on cpu, and other on cuda:0, which differ"):
        on_all_devices(config(device=["cpu", "cuda:0"]), engines.build)
    assert [engine.closed for engine in engines.made] == [True, True]


def test_what_was_made_is_closed_if_an_engine_cannot_be(engines):
    engines.most = 2
    with pytest.raises(ModelLoadError, match="one too many"):
        on_all_devices(config(instances=3), engines.build)
    assert [engine.closed for engine in engines.made] == [True, True]


@pytest.mark.parametrize(("one_thread_s", "count"), [(0.02, 4), (0.039, 1), (0.08, 1)])
def test_auto_chooses_what_explains_more(engines, one_thread_s, count):
    engines.image_s.update({None: 0.01, 1: one_thread_s})
    built = on_all_devices(config(instances="auto"), engines.build)
    assert len(built.engines) == count
    assert {engine.threads for engine in built.engines} == ({1} if count > 1 else {None})
    assert [engine.closed for engine in engines.made] == [False] * count + [True] * (4 - count)
    (said,) = built.assumptions
    assert f"{count} of 4 engines run on the CPU: one on all cores explains 100.0 images a second" in said
    assert f"each explain {4 / one_thread_s:.1f}, in batches of 4; instances overrides that." in said


def test_auto_measures_a_slow_model_by_single_images_and_once(engines):
    engines.image_s.update({None: 3.0, 1: 3.0})
    built = on_all_devices(config(instances="auto"), engines.build)
    assert "in batches of 1;" in built.assumptions[0]
    # Of one engine: an image, and the measurement; then the warm-up of four, and the measurement.
    assert engines.now() <= 7 * 3.0


@pytest.mark.parametrize("keys", [{"device": "cuda:0"}, {"device": "cpu"}])
def test_auto_is_one_on_a_gpu_and_on_one_core(engines, monkeypatch, keys):
    if keys["device"] == "cpu":
        monkeypatch.setattr(instances, "usable_cores", lambda: 1)
    built = on_all_devices(config(instances="auto", **keys), engines.build)
    assert (len(built.engines), built.assumptions) == (1, ())


def test_an_engine_is_tried_by_a_method_of_its_own(engines):
    """A second engine, which takes seconds to load, is not."""
    ran = []
    info = dataclasses.replace(
        INFO, methods=(Method.GRAD_CAM, Method.LAYER_CAM), fallback_methods=frozenset({Method.GRAD_CAM})
    )
    engine = Made(info, engines)
    explain = engine.explain

    def explained(images: np.ndarray, targets: object, spec: MapSpec) -> list[ImageResult]:
        ran.append(spec.method)
        results = explain(images, targets, spec)
        results[0].logits[:] = np.nan
        return results

    engine.explain = explained
    with pytest.raises(ValueError, match="not finite"):
        try_out(engine)
    assert ran == [Method.LAYER_CAM]
