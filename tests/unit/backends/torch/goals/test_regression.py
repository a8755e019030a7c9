"""Regression: values, what raises and what lowers them, and measures that need no probability."""

import dataclasses

import numpy as np
import pytest
import torch

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.goals.regression import Regression
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.output_reading import OutputReading
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method, Metric, Score
from heatlens_server.core.targets import Direction, TopK, Values
from heatlens_server.core.tasks import Task
from heatlens_server.imaging.preprocess import normalise
from loaded_models import noise, without_hooks
from task_models import by_hand, raw, recorded

PX = 64
SPEC = MapSpec(Method.HI_RES_CAM, ("net.body",), upsample=False)
UP, DOWN = Direction.INCREASE, Direction.DECREASE


def load(name, **options):
    source = f"python:output_networks:{name}"
    preprocess = {"resize_px": PX, "crop_px": PX}
    return load_model(ModelConfig(name="m", source=source, task="regression", preprocess=preprocess, **options))


def driven(steps):
    """What steps return at their end."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.fixture
def engine():
    made = TorchEngine(load("logits"), device="cpu")
    yield made
    made.close()


def test_values_are_what_the_network_returns(engine):
    """Several outputs of one image, another one and another direction of the next, in one batch."""
    images, model = noise(2, PX), load("logits")
    results = engine.explain(images, [Values((7, 2)), Values((2,), DOWN)], SPEC)
    for image, result in zip(images, results, strict=True):
        network = without_hooks(model.module)
        inputs = torch.from_numpy(normalise(image, model.preprocess))[None]
        for k, (finding, output) in enumerate(zip(result.findings, result.class_ids, strict=True)):
            activations, values = recorded(network, "net.body", inputs)
            assert finding.value == pytest.approx(values[0, output].item(), rel=1e-4)
            assert (finding.logit, finding.probability) == (0, 0)
            np.testing.assert_allclose(result.values, values[0].detach(), atol=1e-4)
            signed = values[0, output] if len(result.class_ids) == 2 else -values[0, output]
            (gradient,) = torch.autograd.grad(signed, activations)
            expected = by_hand(Method.HI_RES_CAM, activations, gradient)
            np.testing.assert_allclose(raw(result, k), expected, atol=1e-5 * expected.max())
    assert [result.class_ids for result in results] == [(7, 2), (2,)]
    assert all(result.logits.size == 0 for result in results)


def test_one_value(engine):
    model = load("one_squeezed")
    assert (model.task, model.class_count) == (Task.REGRESSION, 1)
    assert not any("output" in said for said in model.assumptions)
    one = TorchEngine(model, device="cpu")
    (result,) = one.explain(noise(1, PX), [Values((0,))], SPEC)
    one.close()
    (expected,) = engine.explain(noise(1, PX), [Values((0,))], SPEC)
    assert result.findings[0].value == pytest.approx(expected.findings[0].value, rel=1e-5)
    np.testing.assert_allclose(result.maps, expected.maps, atol=1e-5)


def test_every_method_explains_what_lowers_a_value(engine):
    """Those of activations alone say the same both ways; the others do not."""
    assert Method.CAM not in engine.info.methods
    assert engine.info.scores == (Score.LOGIT,)
    image = noise(1, PX)[0]
    for method in engine.info.methods:
        maps = []
        for direction in Direction:
            spec = dataclasses.replace(SPEC, method=method)
            target = Values((3,), direction)
            if spec.in_steps:
                result = driven(engine.steps(image, target, spec, rows=8))
            else:
                (result,) = engine.explain(image[None], [target], spec)
            assert result.is_finite
            maps.append(raw(result, 0))
        # FullGrad sums sizes of gradients, and Smooth Grad-CAM++ the parts of them that are positive.
        same = method.traits.class_free or method is Method.FULL_GRAD
        assert np.allclose(maps[0], maps[1], atol=1e-5 * maps[0].max()) is same, method


def measured(engine, direction):
    spec = dataclasses.replace(SPEC, metrics=(Metric.ROAD_MORF, Metric.SPARSENESS, Metric.MODEL_RANDOMISATION))
    (found,) = driven(engine.steps(noise(1, PX)[0], Values((3,), direction), spec, rows=8)).faithfulness
    return found


def test_measures_are_in_units_of_the_value(engine):
    rises, falls = measured(engine, UP), measured(engine, DOWN)
    for found in (rises, falls):
        assert 0 <= found[Metric.SPARSENESS] < 1
        assert -1 <= found[Metric.MODEL_RANDOMISATION] <= 1
        assert np.isfinite(found[Metric.ROAD_MORF])
    assert rises[Metric.ROAD_MORF] != falls[Metric.ROAD_MORF]


def test_targets_of_other_tasks_are_refused():
    with pytest.raises(TypeError, match="explains values"):
        Regression(OutputReading()).goals(torch.zeros(1, 4), [TopK(1)], score=Score.LOGIT, run=lambda _: None)


def test_values_have_no_kind():
    with pytest.raises(ModelLoadError, match="outputs: is for classifiers, and this model is for regression"):
        load("sigmoids", outputs="probabilities")
    # They are taken as they are.
    assert load("sigmoids").reading.kind == "logits"
