"""How many runs of the model are said to be made, against those that are made."""

import dataclasses

import pytest

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method, Metric
from heatlens_server.core.targets import TopK
from heatlens_server.maps.steps.drive import STEPPERS
from heatlens_server.maps.steps.job import at_once
from heatlens_server.maps.steps.runs import model_runs
from loaded_models import loaded, noise

BODY = MapSpec(Method.GRAD_CAM, ("body",), upsample=True)
SCORE_CAM = dataclasses.replace(BODY, method=Method.SCORE_CAM)


def runs_made(spec: MapSpec, count: int) -> tuple[int, int]:
    """Rows that the network runs on, forward and backward, and how many are said to be."""
    module = tiny_models.tiny_mlp()
    engine = TorchEngine(loaded(module, ("body", "stem")))
    seen: list[int] = []
    for each in (engine._model.module, engine._model.twin().module):
        each.head.register_forward_hook(lambda _module, _given, found: seen.append(len(found)))
        each.head.register_full_backward_hook(lambda _module, _given, found: seen.append(len(found[0])))
    for _ in range(2):  # the way to replay is found once
        seen.clear()
        if spec.in_steps:
            at_once(engine.steps(noise(1)[0], TopK(count), spec, rows=4))
        else:
            engine.explain(noise(1), [TopK(count)], spec)
    return sum(seen), model_runs(spec, count, engine.info.layer_shapes)


@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.EIGEN_CAM, *STEPPERS])
@pytest.mark.parametrize("count", [1, 3])
def test_all_runs_of_a_method_are_counted(method, count):
    made, said = runs_made(dataclasses.replace(BODY, method=method), count)
    # Constant channels, of which there are none here, would share one more.
    assert made <= said <= 1.07 * made + 1


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(BODY, augment=True),
        dataclasses.replace(SCORE_CAM, augment=True),
        dataclasses.replace(SCORE_CAM, layers=("body", "stem")),
        *(dataclasses.replace(SCORE_CAM, metrics=(metric,)) for metric in Metric),
        dataclasses.replace(BODY, metrics=tuple(Metric), augment=True),
    ],
    ids=str,
)
def test_smoothing_layers_and_measures_are_counted(spec):
    made, said = runs_made(spec, 2)
    assert made <= said <= 1.1 * made + 2


def test_what_is_not_known_of_a_layer_is_taken_to_be_as_of_the_largest():
    shapes = {"body": (16, 8, 8), "stem": (4, 30, 40)}
    other = dataclasses.replace(SCORE_CAM, layers=("other",))
    assert model_runs(other, 1, shapes) == model_runs(SCORE_CAM, 1, shapes) == 1 + 17
    places = dataclasses.replace(other, method=Method.RECIPRO_CAM)
    assert model_runs(places, 1, shapes) == 1 + 30 * 40
    assert model_runs(other, 1, {}) == 2
