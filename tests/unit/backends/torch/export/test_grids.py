"""Exports of transformers: graphs return maps whatever form the layer has, and the manifest says which."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.torch.cam.grid import Grid, Layout
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.delivery import export_model
from heatlens_server.backends.torch.export.differentiate import differentiate
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.graph_spec import MANIFEST_FILE, Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds
from loaded_models import loaded, noise
from tiny_transformers import CLASS_COUNT, transformer


def model_of(name):
    module = transformer(name)
    found = discover(module, (64, 64))
    return dataclasses.replace(loaded(module, found.layers, class_count=CLASS_COUNT), grids=found.grids)


def check_graph(name, shape):
    """Compare a graph, as operators of torch, with the torch engine."""
    model = model_of(name)
    spec = GraphSpec(model.layers[0], Method.GRAD_CAM, 2, "fp32", InputKind.UINT8, tuple(Output))
    graph = differentiate(model, spec)
    images, class_ids = noise(3), np.array([[0, 1], [2, 3], [4, 5]])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    outputs = dict(zip(Output, graph(pixels, torch.from_numpy(class_ids)), strict=True))
    assert outputs[Output.ACTIVATIONS].shape == (3, *shape)
    assert outputs[Output.GRADIENTS].shape == (3, 2, *shape)
    engine = TorchEngine(model, device="cpu")
    try:
        results = engine.explain(
            images,
            [ClassIds(tuple(ids)) for ids in class_ids.tolist()],
            MapSpec(Method.GRAD_CAM, model.layers[:1], upsample=False),
        )
    finally:
        engine.close()
    expected = np.stack([result.maps for result in results])
    assert (expected.max((2, 3)) == 1).any()
    np.testing.assert_allclose(outputs[Output.CAM], expected, atol=1e-4)
    np.testing.assert_allclose(outputs[Output.LOGITS], np.stack([result.logits for result in results]), atol=1e-4)


def test_graphs_of_tokens():
    check_graph("deit-distilled", (32, 4, 4))


def test_graphs_of_channels_last_maps():
    check_graph("swin", (192, 2, 2))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_onnx_export_of_a_vit_verifies_and_names_its_grid(tmp_path, precision):
    model = model_of("vit-shallow")
    spec = GraphSpec(model.layers[0], precision=precision)
    manifest = export_model(
        model,
        spec,
        file_format=Format.ONNX,
        source="test",
        folder=tmp_path,
        verify=True,
        report=lambda _: None,
    )
    parity = manifest.parity
    assert parity["compared_maps"] > 0
    assert parity["figures"]["weights"]["error"] < (1e-4 if precision == "fp32" else 0.02)
    grid = Grid(Layout.TOKENS, prefix=1, height=4, width=4)
    assert read_manifest(tmp_path).graphs[0].grid == grid
    assert json.loads((tmp_path / MANIFEST_FILE).read_text())["graphs"][0]["grid"] == dataclasses.asdict(grid)
    shapes = {tensor.name: tensor.shape for tensor in manifest.outputs}
    assert shapes["activations"] == ("batch", 32, 4, 4)
    assert shapes["gradients"] == ("batch", 1, 32, 4, 4)
