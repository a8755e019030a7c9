"""What every method of one pass keeps to: batches, precision, flat maps, and nothing left on the network."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.passes.table import PASSES
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import hook_count, noise
from one_pass_models import placed, raw
from tiny_models import tiny_mlp
from tiny_transformers import transformer

NETWORKS = {"tiny_mlp": tiny_mlp, "vit": lambda: transformer("vit")}
CASES = [
    (method, name) for method in PASSES for name in NETWORKS if not (method is Method.LE_GRAD and name == "tiny_mlp")
]
cases = pytest.mark.parametrize(("method", "name"), CASES)


def engine_of(name, precision="fp32"):
    return TorchEngine(placed(NETWORKS[name](), precision=precision).model, device="cpu", precision=precision)


def spec(engine, method, **options):
    return MapSpec(method, engine.info.layers[:1], **{"upsample": False, **options})


@cases
def test_a_batch_gives_what_each_image_gives_alone(method, name):
    """With unequal numbers of classes, of which some are absent."""
    engine, images = engine_of(name), noise(3)
    targets = [TopK(2), ClassIds((5,)), ClassIds((4, 2, 0))]
    together = engine.explain(images, targets, spec(engine, method))
    for n, result in enumerate(together):
        (alone,) = engine.explain(images[n : n + 1], targets[n : n + 1], spec(engine, method))
        assert result.class_ids == alone.class_ids
        assert result.maps.shape[0] == targets[n].count
        assert result.maps.max() == 1.0
        # A map's smallest details are rounding of sums whose order the batch may change.
        np.testing.assert_allclose(result.maps, alone.maps, atol=1e-4)
        np.testing.assert_allclose(result.scales, alone.scales, rtol=1e-4)


@cases
@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.01), ("bf16", 0.04)])
def test_half_precision_is_finite_and_close(method, name, precision, tolerance):
    half, full = engine_of(name, precision), engine_of(name)
    images, targets = noise(2), [ClassIds((1, 3))] * 2
    assert method in half.info.methods
    found = half.explain(images, targets, spec(half, method))
    expected = full.explain(images, targets, spec(full, method))
    for one, other in zip(found, expected, strict=True):
        assert np.isfinite(one.maps).all()
        assert np.isfinite(one.scales).all()
        assert one.maps.max() == 1.0
        assert np.abs(one.maps - other.maps).mean() <= tolerance


@cases
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_class_that_nothing_speaks_for_has_a_map_of_zeros(method, name, precision):
    module = NETWORKS[name]()
    head = [child for child in module.modules() if isinstance(child, nn.Linear)][-1]
    head.weight.data[3] = 0.0
    engine = TorchEngine(placed(module).model, device="cpu", precision=precision)
    (result,) = engine.explain(noise(1), [ClassIds((2, 3))], spec(engine, method))
    assert result.maps[0].max() == 1.0
    assert not result.maps[1].any()
    assert result.scales[1] == 0.0


@cases
def test_maps_have_the_size_asked_for_or_that_of_the_input(method, name):
    engine = engine_of(name)
    (small,) = engine.explain(noise(1), [TopK(1)], spec(engine, method))
    (large,) = engine.explain(noise(1), [TopK(1)], spec(engine, method, upsample=True))
    assert large.maps.shape == (1, 64, 64)
    assert (small.maps.shape == large.maps.shape) is method.traits.always_at_input_size


@cases
def test_nothing_is_left_on_the_network(method, name):
    model = placed(NETWORKS[name]())

    def state():
        return {key: (set(vars(child)), hook_count(child), type(child)) for key, child in model.module.named_modules()}

    before, weights = state(), {key: value.clone() for key, value in model.module.state_dict().items()}
    raw(model, noise(2), [TopK(1)] * 2, method)
    assert state() == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.module.parameters())
    for key, value in model.module.state_dict().items():
        assert torch.equal(value, weights[key])
    model.close()
    assert hook_count(model.module) == 0


def test_threads_that_share_a_network_do_not_meet():
    model = placed(transformer("vit"))
    methods = [*PASSES, Method.GRAD_CAM]
    images, targets = noise(2), [ClassIds((1, 2))] * 2
    expected = {method: raw(model, images, targets, method)[0] for method in methods}
    wrong, gate = [], threading.Barrier(len(methods))

    def work(method):
        gate.wait()
        for _ in range(4):
            with torch.enable_grad():
                (found,) = raw(model, images, targets, method)
            if not torch.allclose(found, expected[method], rtol=1e-4, atol=1e-5 * float(expected[method].abs().max())):
                wrong.append(method)

    threads = [threading.Thread(target=work, args=(method,)) for method in methods]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
