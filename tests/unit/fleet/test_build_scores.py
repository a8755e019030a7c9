"""Exports that people made, served from their folders: of another score than the logit, and of earlier versions."""

import dataclasses
import shutil

import numpy as np
import pytest

import tiny_models
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method, Score
from heatlens_server.core.targets import TopK
from heatlens_server.fleet.build import build
from loaded_models import loaded, noise, user_export


@pytest.mark.parametrize(
    ("score", "method", "other"),
    [(Score.CONTRAST, Method.FINER_CAM, "grad-cam"), (Score.PROBABILITY, Method.GRAD_CAM, "finer-cam")],
)
def test_an_export_of_one_score_is_served_by_the_name_of_what_it_explains(tmp_path, score, method, other):
    model = loaded(tiny_models.tiny_mlp())
    folder, manifest = user_export(model, Format.ONNX, GraphSpec("body", score=score))
    folder = shutil.copytree(folder, tmp_path / "export")
    manifest.write(folder)
    built = build(ModelConfig(name="e", source=f"export:{folder}"), cache_dir=None)
    info = built.engine.info
    assert (built.method, info.scores) == (method, (score,))
    assert {method, Method.LAYER_CAM} <= set(info.requestable_methods)
    named = build(ModelConfig(name="e", source=f"export:{folder}", method=method), cache_dir=None)
    named.engine.close()
    spec = MapSpec(method.as_preset.method, ("body",), upsample=False, score=score)
    reference = TorchEngine(model, device="cpu")
    (found,), (expected,) = (engine.explain(noise(1), [TopK(1)], spec) for engine in (built.engine, reference))
    assert expected.maps.max() == 1
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-5)
    built.engine.close()
    with pytest.raises(ModelLoadError, match=f"method {other} is not supported"):
        build(ModelConfig(name="e", source=f"export:{folder}", method=other), cache_dir=None)


def test_an_export_of_a_version_that_stored_no_passes_is_refused(tmp_path):
    folder, manifest = user_export(loaded(tiny_models.tiny_mlp()), Format.ONNX, GraphSpec("body"))
    shutil.copytree(folder, tmp_path / "export")
    files = {name: digest for name, digest in manifest.files.items() if name != "network.json"}
    dataclasses.replace(manifest, files=files).write(tmp_path / "export")
    with pytest.raises(ModelLoadError, match="a version of heatlens that stored no passes: export the model again"):
        build(ModelConfig(name="e", source=f"export:{tmp_path / 'export'}"), cache_dir=None)
