"""An engine in a process of its own answers as the same engine in this one, which the other contracts judge."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest
from safetensors.torch import save_file

import tiny_models
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec, SteppingEngine
from heatlens_server.core.errors import ModelInterrupted, ModelLoadError
from heatlens_server.core.methods import CLOSED_FORMS, Method, Metric
from heatlens_server.core.results import ImageResult
from heatlens_server.core.targets import ClassIds
from heatlens_server.fleet.build import build
from heatlens_server.fleet.isolated_engine import build_isolated
from heatlens_server.maps.steps.drive import STEPPERS
from loaded_models import noise
from server_process import SUPPORT
from server_toml import MEAN, STD

CONFIG = ModelConfig(
    name="tiny",
    source="python:tiny_models:tiny_mlp",
    engine="torch",
    layers=("body", "stem"),
    preprocess={"resize_px": 64, "crop_px": 64, "mean": MEAN, "std": STD},
    isolation="process",
)
TARGETS = [ClassIds((3, 7)), ClassIds((1,))]
BODY = MapSpec(Method.GRAD_CAM, ("body",), upsample=True)


def isolated(config: ModelConfig):
    return build_isolated(config, cache_dir=None, log_format="console", log_level="error")


@pytest.fixture(scope="module")
def engines() -> Iterator[tuple[SteppingEngine, SteppingEngine]]:
    """The engine in its process, and the one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SUPPORT))
        theirs, ours = isolated(CONFIG), build(CONFIG, cache_dir=None)
    assert dataclasses.replace(theirs, engine=ours.engine) == ours
    yield theirs.engine, ours.engine
    theirs.engine.close()
    ours.engine.close()


def equal(one: ImageResult, other: ImageResult) -> None:
    for field in dataclasses.fields(one):
        found, expected = getattr(one, field.name), getattr(other, field.name)
        if isinstance(expected, np.ndarray):
            np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=field.name)
        elif field.name == "class_ids":
            assert found == expected


def run(engine: SteppingEngine, spec: MapSpec) -> tuple[ImageResult, int]:
    steps, count = engine.steps(noise(1)[0], TARGETS[0], spec, rows=4), 0
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value, count
        count += 1


def test_it_can_do_the_same(engines):
    theirs, ours = engines
    assert theirs.info == ours.info


# CAM does not apply to this network.
@pytest.mark.parametrize("method", [method for method in CLOSED_FORMS if method is not Method.CAM])
def test_maps_are_the_same(engines, method):
    theirs, ours = engines
    spec = dataclasses.replace(BODY, method=method)
    for one, other in zip(*(engine.explain(noise(2), TARGETS, spec) for engine in (theirs, ours)), strict=True):
        equal(one, other)


@pytest.mark.parametrize("spec", [*(dataclasses.replace(BODY, method=method) for method in STEPPERS)], ids=str)
def test_steps_are_the_same_and_as_many(engines, spec):
    (one, steps), (other, expected_steps) = (run(engine, spec) for engine in engines)
    equal(one, other)
    assert steps == expected_steps > 1


def test_measures_come_through(engines):
    spec = dataclasses.replace(BODY, metrics=(Metric.AVERAGE_DROP,))
    (one, _), (other, _) = (run(engine, spec) for engine in engines)
    assert dict(one.faithfulness[0]) == pytest.approx(dict(other.faithfulness[0]), abs=1e-6)


def test_steps_may_be_interleaved_and_given_up(engines):
    engine, ours = engines
    spec = dataclasses.replace(BODY, method=Method.SCORE_CAM)
    first, second = (engine.steps(noise(1)[0], TARGETS[0], spec, rows=4) for _ in range(2))
    next(first)
    next(second)
    first.close()
    equal(run(engine, spec)[0], run(ours, spec)[0])
    second.close()


def test_errors_of_the_engine_are_told_with_their_traceback(engines):
    with pytest.raises(RuntimeError, match="no-such-layer") as raised:
        engines[0].explain(noise(1), TARGETS[:1], dataclasses.replace(BODY, layers=("no-such-layer",)))
    assert "Traceback" in str(raised.value)


def test_what_is_needed_later_is_loaded_there():
    engine = isolated(ModelConfig(name="m", source="embedded:efficientnet_lite0", isolation="process")).engine
    try:
        image = np.repeat(np.repeat(noise(1)[0], 4, 0), 4, 1)[
            : engine.info.input_height_px, : engine.info.input_width_px
        ]
        spec = MapSpec(Method.FULL_GRAD, engine.info.layers[:1], upsample=True)
        assert not engine.is_loaded_for(spec)
        engine.load_for(spec)
        assert engine.is_loaded_for(spec)
        (result,) = engine.explain(image[None], [ClassIds((3,))], spec)
        assert result.maps.max() == 1.0
    finally:
        engine.close()


def test_an_engine_that_loads_nothing_later_is_not_asked(engines):
    assert engines[0].is_loaded_for(BODY)


def test_a_process_that_is_started_again_takes_no_other_weights(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(SUPPORT))
    file = tmp_path / "weights.safetensors"
    save_file(tiny_models.tiny_mlp().state_dict(), file)
    engine = isolated(CONFIG.model_copy(update={"weights": str(file), "version": "1"})).engine
    try:
        save_file({name: one + 1 for name, one in tiny_models.tiny_mlp().state_dict().items()}, file)
        engine.restart()
        deadline = time.monotonic() + 60
        while "reload the model" not in str(engine.outage):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "python:tiny_models:broken"}, "OSError|factory"),
        ({"source": "python:tiny_models:ends_in_factory"}, "exit code 7"),
        ({"max_rss_bytes": 1000}, "max_rss_bytes"),
    ],
)
def test_what_cannot_be_loaded_says_why(monkeypatch, changes, message):
    monkeypatch.syspath_prepend(str(SUPPORT))
    with pytest.raises(ModelLoadError, match=message):
        isolated(CONFIG.model_copy(update=changes))


def test_instances_have_a_process_each_and_divide_the_cores():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SUPPORT))
        built = isolated(CONFIG.model_copy(update={"instances": 2}))
    try:
        one, other = built.engines
        for theirs, ours in zip(
            one.explain(noise(2), TARGETS, BODY), other.explain(noise(2), TARGETS, BODY), strict=True
        ):
            equal(theirs, ours)
        # Each has its own: what ends one leaves the other.
        one.restart()
        with pytest.raises(ModelInterrupted):
            one.explain(noise(2), TARGETS, BODY)
        assert other.explain(noise(2), TARGETS, BODY)
        assert other.outage is None
    finally:
        built.close()
