"""What a network returns, found by running it: which part, which form, which activation, and which task that makes."""

import numpy as np
import pytest
import torch

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.core.tasks import Task
from heatlens_server.imaging.preprocess import normalise
from loaded_models import noise, without_hooks
from server_toml import MEAN, STD
from task_models import by_hand, raw, recorded

PX = 64


def load(name, **options):
    # All of it, so that nothing is assumed and said about it.
    preprocess = {"resize_px": PX, "crop_px": PX, "mean": MEAN, "std": STD}
    source = f"python:output_networks:{name}"
    return load_model(ModelConfig(name="m", source=source, preprocess=preprocess, **options))


def explained(name, class_ids=(3, 0, 7), *, images=None, **options):
    """Logits, probabilities and raw maps of several images, of which the last stands alone."""
    model = load(name, **options)
    engine = TorchEngine(model, device="cpu")
    spec = MapSpec(Method.HI_RES_CAM, ("net.body",), upsample=False)
    images = noise(3, PX) if images is None else images
    target = ClassIds(tuple(class_ids))
    results = engine.explain(images[:2], [target] * 2, spec) + engine.explain(images[2:], [target], spec)
    engine.close()
    logits = np.stack([result.logits for result in results])
    probabilities = np.stack([model.task.traits.class_probabilities(result.logits) for result in results])
    maps = np.stack([[raw(result, k) for k in range(len(class_ids))] for result in results])
    assert maps.max() > 0
    return logits, probabilities, maps


def assert_same(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("mapping", {}), ("entries", {}), ("record", {}), ("out", {}), ("named", {}), ("listed", {})),
        *(("spatial", {}), ("squeezed", {}), ("pair", {"output": 1}), ("entries", {"output": "more"})),
    ],
)
def test_other_forms_give_what_the_tensor_gives(name, options):
    assert_same(explained(name, **options), explained("logits"))


@pytest.mark.parametrize(
    "name", ["softmax", "softmax_function", "softmax_method", "spatial_softmax", "log_softmax", "log_softmax_function"]
)
def test_before_a_softmax_are_the_logits(name):
    model = load(name)
    kind = "log-probabilities" if "log" in name else "probabilities"
    assert model.reading.kind == kind
    assert [kind in assumption and "outputs =" in assumption for assumption in model.assumptions] == [True]
    assert_same(explained(name), explained("logits"))


def test_a_softmax_that_float32_saturates_is_explained_by_its_logits():
    found, expected = explained("sharp_softmax"), explained("sharp_logits")
    # Probabilities of 1 in float32, whose gradient is lost.
    assert (expected[1].max(1) == 1).any()
    assert_same(found, expected)


def test_of_a_softmax_that_cannot_be_seen_the_probabilities_are_right_and_it_is_said():
    model = load("written_out")
    assert any("cannot be seen" in assumption for assumption in model.assumptions)
    found, expected = explained("written_out"), explained("logits")
    np.testing.assert_allclose(found[1], expected[1], atol=1e-6)
    # Maps explain the logarithm of a probability: the logit, and what lowers the other classes'.
    differences = found[0] - expected[0]
    np.testing.assert_allclose(differences, differences[:, :1].repeat(10, 1), atol=1e-4)


@pytest.mark.parametrize("name", ["sigmoids", "sigmoids_in_place"])
def test_a_sigmoid_of_each_class_makes_a_multi_label_model(name):
    model = load(name)
    assert model.task is Task.MULTI_LABEL
    assert any("multi-label-classification" in assumption for assumption in model.assumptions)
    assert_same(explained(name), explained("logits", task="multi-label-classification"))
    assert not any("multi-label" in said for said in load(name, task="multi-label-classification").assumptions)


def test_sigmoids_that_cannot_be_seen_may_be_logits_unless_the_configuration_says_so():
    model = load("sigmoid_written_out", task="multi-label-classification")
    assert model.reading.kind == "logits"
    assert any('outputs = "probabilities"' in assumption for assumption in model.assumptions)
    found = explained("sigmoid_written_out", [0, 2], task="multi-label-classification", outputs="probabilities")
    expected = explained("logits", [0, 2], task="multi-label-classification")
    assert_same(found, (expected[0][:, :3], expected[1][:, :3], expected[2]), 1e-4)


def test_logits_that_lie_between_0_and_1_stay_logits():
    model = load("small_logits")
    assert (model.task, model.reading.kind) == (Task.CLASSIFICATION, "logits")
    assert len(model.assumptions) == 1


def test_ordinary_logits_need_no_word():
    assert load("logits").assumptions == ()


def test_what_is_declared_is_not_looked_for():
    model = load("softmax", outputs="logits")
    assert (model.reading.kind, model.assumptions) == ("logits", ())
    assert_same(explained("softmax", outputs="probabilities"), explained("logits"))


class TestOneOutput:
    @pytest.mark.parametrize("name", ["one_logit", "one_squeezed", "one_sigmoid"])
    def test_two_sides_of_one_logit(self, name):
        """Class 1 by +z, class 0 by -z, as BinaryClassifierOutputTarget of the grad-cam package."""
        model = load(name)
        assert (model.task, model.class_count) == (Task.BINARY, 2)
        assert any("taken as a binary classifier" in assumption for assumption in model.assumptions)
        z, _, of_one = explained("one_logit", [0], task="multi-label-classification")
        logits, probabilities, maps = explained(name, [1, 0])
        np.testing.assert_allclose(logits, np.hstack([-z, z]), atol=1e-5)
        np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(np.hstack([z, -z]))), atol=1e-6)
        np.testing.assert_allclose(maps[:, 0], of_one[:, 0], atol=1e-5 * of_one.max())
        assert maps[:, 1].max() > 0
        assert not np.allclose(maps[:, 1], maps[:, 0])

    def test_the_other_side_has_the_negative_gradient(self):
        model = load("one_logit")
        network, image = without_hooks(model.module), noise(1, PX)
        inputs = torch.from_numpy(normalise(image[0], model.preprocess))[None]
        activations, output = recorded(network, "net.body", inputs)
        (gradient,) = torch.autograd.grad(-output.sum(), activations)
        engine = TorchEngine(model, device="cpu")
        (result,) = engine.explain(image, [ClassIds((0,))], MapSpec(Method.HI_RES_CAM, ("net.body",), upsample=False))
        engine.close()
        expected = by_hand(Method.HI_RES_CAM, activations, gradient)
        np.testing.assert_allclose(raw(result, 0), expected, atol=1e-5 * expected.max())

    def test_declared(self):
        assert load("one_logit", task="binary-classification").assumptions == ()
        assert load("one_logit", task="multi-label-classification").class_count == 1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pair", {}, "returns a tuple of 0 (1, 10), 1 (1, 10): set output to the one that holds the scores"),
        ("pair", {"output": 2}, "output: the network's tuple has no tensor 2, only 0, 1"),
        ("pair", {"output": "logits"}, "output: the network's tuple has no tensor 'logits'"),
        ("named", {"output": "logits"}, "has no tensor 'logits', only 'prediction'"),
        ("one_logit", {"task": "classification"}, "task: of one output the softmax is always 1"),
        ("logits", {"task": "binary-classification"}, "task: a binary classifier has one output, and this network has"),
        ("sigmoids", {"task": "classification"}, 'which are those of "multi-label-classification"'),
        ("softmax", {"task": "multi-label-classification"}, 'which are those of "classification"'),
        ("logits", {"outputs": "probabilities"}, "outputs: the network returns values from"),
        ("softmax", {"task": "embedding", "outputs": "probabilities"}, "outputs: is for classifiers"),
    ],
)
def test_refusals_name_the_key(name, options, message):
    with pytest.raises(ModelLoadError) as caught:
        load(name, **options)
    assert message in str(caught.value)
