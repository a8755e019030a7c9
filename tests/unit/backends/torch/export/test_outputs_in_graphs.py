"""Exports of networks whose output is no tensor of logits: they return the logits that the torch engine reads."""

import copy
import dataclasses

import numpy as np
import pytest

from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.verify import verify
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from heatlens_server.core.tasks import Task
from loaded_models import network, noise

PX = 64


@pytest.mark.parametrize(
    ("name", "options", "task"),
    [
        ("one_logit", {}, Task.BINARY),
        ("one_sigmoid", {}, Task.BINARY),
        ("sigmoids", {}, Task.MULTI_LABEL),
        ("log_softmax_function", {}, Task.CLASSIFICATION),
        ("sharp_softmax", {}, Task.CLASSIFICATION),
        ("written_out", {}, Task.CLASSIFICATION),
        ("entries", {}, Task.CLASSIFICATION),
        ("pair", {"output": 1}, Task.CLASSIFICATION),
        ("spatial", {}, Task.CLASSIFICATION),
    ],
)
def test_exports_say_what_torch_says(name, options, task):
    size = {"resize_px": PX, "crop_px": PX}
    source = f"python:output_networks:{name}"
    model = load_model(ModelConfig(name="m", source=source, preprocess=size, layers=["net.body"], **options))
    assert model.task is task
    folder, manifest = network(model)
    assert (manifest.task, manifest.class_count, manifest.assumptions) == (task, model.class_count, model.assumptions)
    verify(model, folder, manifest, report=lambda _: None)
    torch_engine = TorchEngine(dataclasses.replace(model, module=copy.deepcopy(model.module)), device="cpu")
    graphs = NetworkEngine(read_network(folder, manifest), device="cpu")
    spec = MapSpec(Method.HI_RES_CAM, ("net.body",), upsample=False)
    for images in (noise(1, PX), noise(3, PX, seed=1)):
        asked = images, [ClassIds((1, 0))] * len(images), spec
        for one, other in zip(graphs.explain(*asked), torch_engine.explain(*asked), strict=True):
            np.testing.assert_allclose(one.logits, other.logits, atol=1e-4 * np.abs(other.logits).max())
            np.testing.assert_allclose(one.maps, other.maps, atol=1e-4)
            np.testing.assert_allclose(one.scales, other.scales, rtol=1e-3)
    graphs.close()
    torch_engine.close()
