"""What verification leaves out of an export: the rest is served, torch runs what is missing, and the log says so."""

import logging

import numpy as np
import pytest

import export_networks
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.fleet.build import build
from heatlens_server.fleet.export import make_export

PREPROCESS = {"resize_px": 32, "crop_px": 32, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
LEFT_OUT = (Method.GRAD_CAM_PLUS_PLUS, Method.LAYER_CAM, Method.ELEMENT_WISE_GRAD_CAM, Method.EIGEN_GRAD_CAM)


@pytest.fixture
def make(cache_home, caplog):
    """Build, and close in the end; all of a run share one export of the network."""
    caplog.set_level(logging.WARNING)
    built = []

    def make(**changes):
        config = ModelConfig(
            **{
                "name": "m",
                "source": "python:export_networks:edged",
                "layers": ["first", "last"],
                "preprocess": PREPROCESS,
                **changes,
            }
        )
        built.append(build(config, cache_dir=cache_home / "heatlens", report=lambda _: None, make=make_export).engine)
        return built[-1]

    yield make
    for engine in built:
        engine.close()


def explained(engine, method: Method, layer: str) -> np.ndarray:
    spec = MapSpec(method, (layer,), upsample=False)
    results = engine.explain(export_networks.pixels(2), [ClassIds((1, 4))] * 2, spec)
    return np.stack([result.maps for result in results])


def test_an_export_is_served_with_what_is_right_and_torch_runs_the_rest(make, caplog):
    engine = make()
    assert engine.info.engine_name == "onnxruntime"
    for method in LEFT_OUT:
        assert f"model m: the export lacks {method} by first, which torch runs beside it: " in caplog.text
    assert caplog.text.count("cam differs from float64 by 0.000") == len(LEFT_OUT)
    assert engine.info.layers == ("first", "last")
    assert engine.info.fallback_methods >= set(LEFT_OUT)
    torch_engine = make(engine="torch")
    for method in (*LEFT_OUT, Method.GRAD_CAM):
        for layer in ("first", "last"):
            is_exported = method not in LEFT_OUT or layer == "last"
            assert engine.primary.can(MapSpec(method, (layer,), upsample=False)) is is_exported
            expected = explained(torch_engine, method, layer)
            assert expected.max() == 1
            np.testing.assert_allclose(explained(engine, method, layer), expected, atol=1e-4)


def test_without_torch_it_is_not_offered(make, caplog):
    engine = make(companion=False)
    assert not set(LEFT_OUT) & set(engine.info.methods)
    assert {Method.GRAD_CAM, Method.HI_RES_CAM} <= set(engine.info.methods)
    assert engine.info.layers_of(Method.GRAD_CAM) == ("first", "last")
    assert "the export lacks layer-cam by first, which is not offered: " in caplog.text


def test_without_the_default_method_by_the_default_layer_torch_runs_the_model(make, caplog):
    engine = make(method="layer-cam")
    assert engine.info.engine_name == "torch"
    assert "model m is run by torch, not by onnxruntime: forward.onnx, layer first: cam differs" in caplog.text
    with pytest.raises(ModelLoadError, match=r"cannot be exported for onnxruntime: .* layer first: cam differs"):
        make(method="layer-cam", engine="onnxruntime")
