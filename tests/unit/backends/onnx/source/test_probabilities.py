"""Files that end in probabilities by operators of their own are served with just those; maps explain their logits."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import TopK
from heatlens_server.core.tasks import Task
from loaded_models import noise
from onnx_files import write_onnx

SAID = "The network returns probabilities, and maps explain its logits"


class Ended(nn.Module):
    def __init__(self, end):
        super().__init__()
        self.body, self.end = tiny_models.tiny(), end

    def forward(self, x):
        return self.end(self.body(x))


def own_softmax(z):
    shares = (z - z.amax(1, keepdim=True)).exp()
    return shares / shares.sum(1, keepdim=True)


def two_heads(z):
    return torch.cat([z[:, :4].sigmoid(), 1 - z[:, 4:].sigmoid()], 1)


def own_sigmoid(z):
    return 1 / (1 + torch.exp(-z))


def sides(z):
    share = z[:, :1].sigmoid()
    return torch.cat([1 - share, share], 1)


def load(path, **changes):
    preprocess = {"mean": [0.5], "std": [0.25]}
    return load_file(path, ModelConfig(name="m", source=f"onnx:{path}", preprocess=preprocess, **changes))


@pytest.fixture
def write(tmp_path):
    return lambda end: write_onnx(Ended(end), tmp_path / "ended.onnx")


@pytest.mark.parametrize(
    ("end", "outputs", "task", "said"),
    [
        (own_softmax, "auto", Task.CLASSIFICATION, SAID),
        (own_softmax, "probabilities", Task.CLASSIFICATION, ""),
        (sides, "auto", Task.CLASSIFICATION, SAID),
        (two_heads, "auto", Task.MULTI_LABEL, SAID),
        (nn.Hardsigmoid(), "auto", Task.MULTI_LABEL, SAID),
        (own_sigmoid, "probabilities", Task.MULTI_LABEL, ""),
    ],
    ids=["softmax", "softmax-said", "sides", "heads", "hard-sigmoid", "sigmoid-said"],
)
def test_probabilities_are_those_of_the_file(write, end, outputs, task, said):
    path = write(end)
    loaded = load(path, outputs=outputs)
    assert loaded.info.task is task
    assert any(sentence.startswith(SAID) for sentence in loaded.assumptions) == bool(said)
    images = noise(2)
    engine = NetworkEngine(loaded, device="cpu", threads=1)
    results = engine.explain(images, [TopK(2)] * 2, MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False))
    given = ((images / 255 - 0.5) / 0.25).astype(np.float32).transpose(0, 3, 1, 2)
    (expected,) = onnxruntime.InferenceSession(path).run(None, {"image": given})
    for result, row in zip(results, expected, strict=True):
        np.testing.assert_allclose(task.traits.class_probabilities(result.logits), row, atol=1e-5)
        assert result.maps.max() == 1


def test_maps_are_those_of_the_logits(write):
    """Of sigmoids; the logarithm of a softmax has another gradient, as the score of all classes goes down with it."""
    images, maps = noise(1), []
    for end, outputs in ((nn.Identity(), "auto"), (own_sigmoid, "probabilities")):
        loaded = load(write(end), outputs=outputs)
        engine = NetworkEngine(loaded, device="cpu", threads=1)
        spec = MapSpec(Method.GRAD_CAM, engine.info.layers[:1], upsample=False)
        maps.append(engine.explain(images, [TopK(1)], spec)[0].maps)
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-4)


def test_log_probabilities(write):
    loaded = load(write(lambda z: own_softmax(z).log()))
    assert any("returns log-probabilities" in sentence for sentence in loaded.assumptions)
    assert loaded.info.task is Task.CLASSIFICATION


def test_what_may_be_probabilities_is_told(write):
    told = load(write(own_sigmoid)).assumptions
    assert any('set outputs = "probabilities" if they are probabilities' in sentence for sentence in told)


def test_outputs_overrides_what_is_seen(write):
    path = write(nn.Softmax(1))
    assert load(path, outputs="logits").scores.activation == ""
    assert load(path, outputs="probabilities").scores.activation == "softmax"
    assert not any("probabilities" in sentence for sentence in load(write(nn.Identity())).assumptions)


@pytest.mark.parametrize(
    ("end", "keys", "message"),
    [
        (nn.Identity(), {"outputs": "probabilities"}, "outputs: the network returns values from .* no probabilities"),
        (nn.Softmax(1), {"outputs": "log-probabilities"}, "outputs: the network returns values from"),
        (nn.Identity(), {"outputs": "probabilities", "task": "regression"}, "outputs: is for classifiers"),
        (two_heads, {"task": "classification"}, 'task: the network returns probabilities by sigmoid.*"multi-label'),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(write, end, keys, message):
    with pytest.raises(ModelLoadError, match=message):
        load(write(end), **keys)
