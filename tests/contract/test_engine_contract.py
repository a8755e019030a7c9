"""What every engine must do, judged in float64. A new engine joins by adding its factory to ENGINES."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
from torch import nn

import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.sources.loaded_model import LoadedModel
from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine
from heatlens_server.core.engine import Engine, MapSpec
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import Judge, bundle, loaded, network, noise
from onnx_files import engine_of_file

ENGINES: dict[str, Callable[[LoadedModel], Engine]] = {
    "torch": lambda model: TorchEngine(model, device="cpu"),
    "onnxruntime": lambda model: NetworkEngine(read_network(*network(model)), device="cpu", threads=1),
    "torchscript": lambda model: TorchScriptEngine(*bundle(model), device="cpu"),
    "onnx file": engine_of_file,
}

TOLERANCE = 1e-4
"""Largest difference of a float32 map in [0, 1] from the float64 judge's."""

GRADIENT_METHODS = [method for method in CLOSED_FORMS if method.traits.needs_gradient]


@pytest.fixture(params=ENGINES)
def make_engine(request: pytest.FixtureRequest):
    made: list[Engine] = []

    def make(module: nn.Module, *layers: str) -> Engine:
        # The same layers wherever it does not matter: an export is made once.
        engine = ENGINES[request.param](loaded(module, layers or ("body", "stem")))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("factory", [tiny_models.tiny, tiny_models.tiny_mlp])
def test_maps_agree_with_float64(make_engine, factory, method, upsample):
    engine, judge = make_engine(factory()), Judge(factory())
    (image,) = noise(1)
    (result,) = engine.explain(image[None], [ClassIds((3, 7))], MapSpec(method, ("body",), upsample))
    expected, raw = judge.maps(image, [3, 7], method, ["body"], upsample=upsample)
    assert expected.max() == 1.0  # a flat map would prove nothing
    np.testing.assert_allclose(result.maps, expected, atol=TOLERANCE)
    rebuilt = result.maps * result.scales[:, None, None] + result.offsets[:, None, None]
    np.testing.assert_allclose(rebuilt, raw, atol=TOLERANCE * np.abs(raw).max())
    np.testing.assert_allclose(result.logits, judge.logits(image), atol=1e-4)


def test_cam_is_grad_cam_up_to_a_constant_where_the_head_is_linear(make_engine):
    engine = make_engine(tiny_models.tiny())
    images = noise(2)
    by_weights = engine.explain(images, [ClassIds((1, 4))] * 2, MapSpec(Method.CAM, ("body",), upsample=False))
    by_gradient = engine.explain(images, [ClassIds((1, 4))] * 2, MapSpec(Method.GRAD_CAM, ("body",), upsample=False))
    for cam, grad_cam in zip(by_weights, by_gradient, strict=True):
        assert cam.maps.max() == 1.0
        np.testing.assert_allclose(cam.maps, grad_cam.maps, atol=TOLERANCE)
        np.testing.assert_allclose(cam.scales, grad_cam.scales * 64, rtol=1e-4)  # the 8x8 pixels of the mean


def test_cam_is_offered_only_where_it_applies(make_engine):
    assert Method.CAM in make_engine(tiny_models.tiny()).info.methods
    assert Method.CAM not in make_engine(tiny_models.tiny_mlp()).info.methods
    assert Method.CAM not in make_engine(tiny_models.tiny(), "stem").info.methods


def test_several_layers_are_averaged_at_the_size_of_the_largest(make_engine):
    engine, judge = make_engine(tiny_models.tiny_mlp(), "body", "stem"), Judge(tiny_models.tiny_mlp())
    (image,) = noise(1)
    for layers in (("body", "stem"), ("stem", "body"), ("stem",)):
        (result,) = engine.explain(image[None], [ClassIds((2,))], MapSpec(Method.LAYER_CAM, layers, upsample=False))
        expected, _ = judge.maps(image, [2], Method.LAYER_CAM, layers, upsample=False)
        assert result.maps.shape == (1, 16, 16)
        np.testing.assert_allclose(result.maps, expected, atol=TOLERANCE)


def test_top_k_names_the_most_probable_classes_in_order(make_engine):
    engine = make_engine(tiny_models.tiny_mlp())
    images = noise(3)
    results = engine.explain(
        images, [TopK(1), ClassIds((9, 0)), TopK(4)], MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
    )
    for result, count in zip(results, (1, 2, 4), strict=True):
        assert result.maps.shape == (count, 8, 8)
        assert result.scales.shape == result.offsets.shape == (count,)
        assert len(result.class_ids) == count
    order = np.argsort(-results[2].logits, kind="stable")
    assert results[2].class_ids == tuple(order[:4])
    assert results[0].class_ids == (int(results[0].logits.argmax()),)
    assert results[1].class_ids == (9, 0)


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_batch_of_n_equals_n_batches_of_one(make_engine, method):
    engine = make_engine(tiny_models.tiny())
    images = noise(7)
    targets = [TopK(2), ClassIds((1,)), TopK(1), ClassIds((0, 5, 9)), TopK(3), ClassIds((2,)), TopK(1)]
    spec = MapSpec(method, ("body",), upsample=False)
    together = engine.explain(images, targets, spec)
    for image, target, result in zip(images, targets, together, strict=True):
        (alone,) = engine.explain(image[None], [target], spec)
        assert alone.class_ids == result.class_ids
        np.testing.assert_allclose(result.maps, alone.maps, atol=1e-5)
        np.testing.assert_allclose(result.logits, alone.logits, atol=1e-5)


def test_threads_that_share_an_engine_get_their_own_maps(make_engine):
    """The server never does this; people who use an engine directly may."""
    engine = make_engine(tiny_models.tiny_mlp())
    images = noise(8)
    spec = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)
    expected = [engine.explain(image[None], [TopK(1)], spec)[0] for image in images]
    wrong: list[int] = []

    def explain(i: int) -> None:
        for _ in range(20):
            (result,) = engine.explain(images[i][None], [TopK(1)], spec)
            if result.class_ids != expected[i].class_ids or np.abs(result.maps - expected[i].maps).max() > 1e-5:
                wrong.append(i)

    threads = [threading.Thread(target=explain, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_flat_image_gives_a_map_without_nan(make_engine):
    engine = make_engine(tiny_models.tiny())
    black = np.zeros((1, 64, 64, 3), np.uint8)
    for method in CLOSED_FORMS:
        (result,) = engine.explain(black, [TopK(1)], MapSpec(method, ("body",), upsample=False))
        assert np.isfinite(result.maps).all()
        assert result.maps.min() >= 0
        assert result.maps.max() <= 1
