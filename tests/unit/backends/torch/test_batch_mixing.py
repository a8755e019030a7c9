"""Networks that mix the images of a batch: each image gets the answer that it gets by itself."""

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import hook_count, loaded, noise


class Tiny(tiny_models.Tiny):
    def features(self, x):
        return self.body(self.stem(x)).mean((-2, -1))


class BatchStatistics(Tiny):
    """Normalises over the batch in eval mode too."""

    def forward(self, x):
        maps = nn.functional.batch_norm(self.body(self.stem(x)), None, None, training=True)
        return self.head(maps.square().mean((-2, -1)))


class SoftmaxOverBatch(Tiny):
    def forward(self, x):
        return self.head(self.features(x) * (1 + self.features(x).softmax(0)))


class MeanOfBatch(Tiny):
    def forward(self, x):
        features = self.features(x)
        return self.head(features + features.mean(0))


class OneImageOnly(Tiny):
    def forward(self, x):
        return self.head(self.body(self.stem(x)).reshape(1, 16, -1).mean(-1))


class InALoop(Tiny):
    """Runs its layers once per image: of a batch they hold the last one."""

    def forward(self, x):
        return torch.cat([self.head(self.features(image[None])) for image in x])


class Dropout(Tiny):
    def forward(self, x):
        return self.head(nn.functional.dropout(self.features(x)))


def of_tiny(kind):
    module = kind()
    module.load_state_dict(tiny_models.tiny().state_dict())
    return module


@pytest.mark.parametrize("kind", [BatchStatistics, SoftmaxOverBatch, MeanOfBatch, OneImageOnly, InALoop])
@pytest.mark.parametrize("method", [Method.GRAD_CAM, Method.EIGEN_CAM])
def test_a_batch_is_its_images_one_by_one(kind, method):
    engine = TorchEngine(loaded(of_tiny(kind)))
    assert engine.info.runs_one_by_one
    images, targets = noise(3), [ClassIds((n,)) for n in range(3)]
    spec = MapSpec(method, ("body",), upsample=False)
    together = engine.explain(images, targets, spec)
    for n, result in enumerate(together):
        (alone,) = engine.explain(images[n : n + 1], [targets[n]], spec)
        np.testing.assert_array_equal(result.logits, alone.logits)
        np.testing.assert_array_equal(result.maps, alone.maps)
        assert result.class_ids == (n,)


@pytest.mark.parametrize("method", [Method.SCORE_CAM, Method.ABLATION_CAM, Method.SMOOTH_GRAD_CAM_PLUS_PLUS])
def test_steps_run_on_single_rows(method):
    module = of_tiny(MeanOfBatch)
    engine = TorchEngine(loaded(module))
    rows: list[int] = []
    module.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    steps = engine.steps(noise(1)[0], ClassIds((0,)), MapSpec(method, ("body",), upsample=False), rows=8)
    for _ in range(4):
        next(steps)
    steps.close()
    assert set(rows) == {1}


@pytest.mark.parametrize("make", [tiny_models.tiny, tiny_models.tiny_mlp])
def test_other_networks_run_in_batches(make):
    assert not TorchEngine(loaded(make())).info.runs_one_by_one


def test_a_network_that_answers_one_image_differently_each_time_is_refused():
    module = of_tiny(Dropout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with pytest.raises(ModelLoadError, match="gives other scores when it is run again on the same image"):
            TorchEngine(loaded(module))
    assert hook_count(module) == 0
