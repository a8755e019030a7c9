"""What every engine makes of pixels: any number of channels, and of float32 what lies between two levels."""

import dataclasses

import numpy as np
import pytest

import tiny_models
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.torchscript_engine import TorchScriptEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import PREPROCESS, Judge, bundle, loaded, network, noise, user_export
from onnx_files import engine_of_file

TOLERANCE = 1e-4
SPEC = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)

# Those that normalise uint8 inside the graph, and those whose graphs take normalised values.
ENGINES = {
    "torch": lambda model: TorchEngine(model, device="cpu"),
    "onnxruntime": lambda model: NetworkEngine(read_network(*network(model)), device="cpu", threads=1),
    "onnxruntime, export of one layer": lambda model: NetworkEngine(
        read_network(*user_export(model, Format.ONNX, GraphSpec("body"))), device="cpu", threads=1
    ),
    "torchscript": lambda model: TorchScriptEngine(*bundle(model), device="cpu"),
    "onnx file": engine_of_file,
}


def preprocess_of(channels, **changes):
    rng = np.random.default_rng(channels)
    mean, std = rng.uniform(0.3, 0.6, channels), rng.uniform(0.2, 0.3, channels)
    return dataclasses.replace(PREPROCESS, mean=tuple(mean.tolist()), std=tuple(std.tolist()), **changes)


def images_of(channels, dtype):
    images = np.ascontiguousarray(noise(2)[..., np.arange(channels) % 3])
    if dtype == np.uint8:
        return images
    return np.clip(images + np.random.default_rng(1).uniform(-0.5, 0.5, images.shape), 0, 255).astype(np.float32)


def engine_of(name, channels, **changes):
    preprocess = preprocess_of(channels, **changes)
    module = tiny_models.of_channels(channels)
    return ENGINES[name](loaded(module, preprocess=preprocess)), Judge(tiny_models.of_channels(channels), preprocess)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("channels", [1, 4])  # 3: below, of values up to 255
@pytest.mark.parametrize("name", ENGINES)
def test_maps_agree_with_float64(name, channels, dtype):
    engine, judge = engine_of(name, channels)
    assert engine.info.input_channels == channels
    images = images_of(channels, dtype)
    results = engine.explain(images, [ClassIds((3, 7))] * 2, SPEC)
    for image, result in zip(images, results, strict=True):
        expected, _ = judge.maps(image, [3, 7], Method.GRAD_CAM, ["body"], upsample=False)
        assert expected.max() == 1.0
        np.testing.assert_allclose(result.maps, expected, atol=TOLERANCE)
        np.testing.assert_allclose(result.logits, judge.logits(image), atol=1e-5)
    engine.close()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("name", ENGINES)
def test_values_up_to_255(name, dtype):
    engine, judge = engine_of(name, 3, scale=255.0)
    (image,) = images_of(3, dtype)[:1]
    (result,) = engine.explain(image[None], [ClassIds((3,))], SPEC)
    expected, _ = judge.maps(image, [3], Method.GRAD_CAM, ["body"], upsample=False)
    np.testing.assert_allclose(result.maps, expected, atol=TOLERANCE)
    unscaled = Judge(tiny_models.of_channels(3), preprocess_of(3)).logits(image)
    assert np.abs(judge.logits(image)).max() > 20 * np.abs(unscaled).max()
    np.testing.assert_allclose(result.logits, judge.logits(image), rtol=1e-5, atol=1e-3)
    engine.close()


@pytest.mark.parametrize("name", ENGINES)
def test_float32_is_not_rounded_to_levels(name):
    engine, _ = engine_of(name, 1)
    images = images_of(1, np.float32)
    (exact, _), (rounded, _) = (
        engine.explain(pixels, [ClassIds((3,))] * 2, SPEC) for pixels in (images, np.rint(images).astype(np.uint8))
    )
    assert np.abs(exact.logits - rounded.logits).max() > 1e-4
    engine.close()


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("method", [Method.SCORE_CAM, Method.FULL_GRAD, Method.GUIDED_GRAD_CAM, Method.ABLATION_CAM])
def test_methods_of_changed_images_take_any_channels_and_float32(channels, method):
    engine, _ = engine_of("torch", channels)
    image = images_of(channels, np.float32)[0]
    spec = dataclasses.replace(SPEC, method=method)
    if spec.in_steps:
        steps = engine.steps(image, ClassIds((3,)), spec, rows=4)
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                result = stop.value
                break
    else:
        (result,) = engine.explain(image[None], [ClassIds((3,))], spec)
    assert result.maps.max() == 1.0
    engine.close()
