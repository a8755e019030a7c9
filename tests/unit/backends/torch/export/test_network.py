"""What a server exports for onnxruntime: a network's passes, right by every layer and method."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import export_networks
import tiny_transformers
from export_networks import make
from heatlens_server.backends.onnx.manifest import read_manifest, sha256_of
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.backends.torch.export.network import export_network
from heatlens_server.backends.torch.export.runtimes import running
from heatlens_server.backends.torch.export.verify import verify
from heatlens_server.backends.torch.sources.layers import discover
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ExportError, ModelLoadError
from heatlens_server.core.graph_spec import InputKind
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.methods import CLOSED_FORMS, Method, Score
from heatlens_server.core.targets import ClassIds
from loaded_models import hook_count, loaded, network, noise


def export(model, folder, phases=None, precision="fp32"):
    report = (phases if phases is not None else []).append
    return export_network(model, methods=CLOSED_FORMS, precision=precision, source="test", folder=folder, report=report)


def assert_same(model, exported, *, methods=(Method.GRAD_CAM, Method.HI_RES_CAM), scores=(Score.LOGIT,)):
    """An exported network explains as the torch engine does, by each layer and by all."""
    graphs, reference = (
        NetworkEngine(read_network(*exported), device="cpu", threads=1),
        TorchEngine(model, device="cpu"),
    )
    size = model.preprocess.input_px[0]
    images = noise(3, size, seed=1)
    highest = 0.0
    for layers in (*((layer,) for layer in model.layers), model.layers):
        for method, score in ((method, score) for method in methods for score in scores):
            asked = images, [ClassIds((1, 0))] * 3, MapSpec(method, layers, upsample=False, score=score)
            for one, other in zip(graphs.explain(*asked), reference.explain(*asked), strict=True):
                np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
                np.testing.assert_allclose(one.maps, other.maps, atol=1e-4)
                highest = max(highest, other.maps.max())
    assert highest == 1
    graphs.close()
    reference.close()


def test_the_folder_and_its_manifest(tmp_path):
    model, phases = make(export_networks.Staged, "last", "first"), []
    manifest = export(model, tmp_path, phases)
    assert phases == ["recording test", "translating to ONNX", "differentiating test by last, first"]
    names = ["backward-1.onnx", "backward-2.onnx", "forward.onnx", "network.json", "tail-1.onnx", "tail-2.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(manifest.files) == [*names, "weights.bin"]
    assert manifest.files["weights.bin"] == sha256_of(tmp_path / "weights.bin")
    assert manifest.is_network
    assert (manifest.weights_version, manifest.layers) == (weights_version(model.module), ("last", "first"))
    assert (manifest.classes, manifest.input, manifest.precision, manifest.opset) == (None, InputKind.FLOAT, "fp32", 20)
    tried = [method for method in CLOSED_FORMS if not method.traits.default_layer_only]
    assert [(graph.layer, graph.method) for graph in manifest.graphs] == [
        *(("last", method) for method in CLOSED_FORMS),
        *(("first", method) for method in tried),
    ]
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_every_method_and_score_by_every_layer():
    model = make(export_networks.Staged)
    methods = [method for method in CLOSED_FORMS if method is not Method.CAM]
    assert_same(model, network(model), methods=methods, scores=Score)


def test_the_model_is_left_as_it_was(tmp_path):
    model = make(export_networks.Staged)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    export(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert hook_count(model.module) == 0


@pytest.mark.parametrize("name", ["deit-distilled", "swin", "vit-shallow"])
def test_tokens_and_channels_last_maps_are_read_outside_of_the_graphs(tmp_path, name):
    module = tiny_transformers.transformer(name)
    found = discover(module, (64, 64))
    model = loaded(module, found.layers, class_count=tiny_transformers.CLASS_COUNT)
    model = dataclasses.replace(model, grids=found.grids)
    manifest = export(model, tmp_path)
    assert {graph.layer: graph.grid for graph in manifest.graphs} == {
        layer: model.grid(layer) for layer in model.layers
    }
    parity = verify(model, tmp_path, manifest, report=lambda _: None)
    assert parity["informative_maps"] > 0
    assert parity["left_out"] == []
    assert_same(model, (tmp_path, manifest), methods=[Method.GRAD_CAM, Method.EIGEN_CAM])


class Chained(nn.Module):
    """Two modules that return one tensor; the layers are given from the first to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=4)
        self.outer = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(inplace=True)))
        self.head = nn.Linear(6, export_networks.CLASSES)

    def forward(self, x):
        return self.head(self.outer(self.first(x)).mean((-2, -1)))


def test_layers_in_any_order_and_of_one_tensor(tmp_path):
    model = make(Chained, "first", "outer", "outer.1")
    manifest = export(model, tmp_path)
    assert manifest.layers == ("first", "outer", "outer.1")
    assert_same(model, (tmp_path, manifest))
    passes = read_network(tmp_path, manifest).passes(manifest.layers)
    assert passes.layers["outer"] == passes.layers["outer.1"] != passes.layers["first"]


def test_a_layer_that_is_not_as_its_grid_says_is_named(tmp_path):
    model = make(export_networks.Staged, "last")
    model = dataclasses.replace(model, grids={"last": Grid(Layout.TOKENS, 1, 3, 4)})
    with pytest.raises(ExportError, match=r"layer 'last'"):
        export(model, tmp_path)


def test_a_layer_without_a_gradient_is_left_out(tmp_path):
    model = make(export_networks.Dangling, "last", "middle")
    manifest = export(model, tmp_path)
    network, reason = read_network(tmp_path, manifest), "the scores do not depend on 'layer: middle'"
    message = f"layer 'middle' cannot be differentiated: {reason}"
    with pytest.raises(ModelLoadError, match=message):
        network.passes(("middle",))
    with pytest.raises(ExportError, match=f"forward.onnx: {message}"):
        running(NetworkEngine(network, device="cpu"), "middle", "forward.onnx")(
            noise(1, export_networks.PX), np.array([[0]])
        )


def test_a_default_layer_without_a_gradient_is_an_error(tmp_path):
    with pytest.raises(ExportError, match="what follows the target layer cannot be differentiated: the scores do not"):
        export(make(export_networks.Dangling, "middle", "last"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_in_half_precision():
    """Forward and backward in float16, maps in float32."""
    model = make(export_networks.Staged)
    engine = NetworkEngine(read_network(*network(model, "fp16")), device="cpu", threads=1)
    assert engine.info.precision == "fp16"
    images = noise(3, export_networks.PX, seed=1)
    asked = images, [ClassIds((1, 0))] * 3, MapSpec(Method.GRAD_CAM, ("middle",), upsample=False)
    reference = TorchEngine(model, device="cpu")
    for one, other in zip(engine.explain(*asked), reference.explain(*asked), strict=True):
        assert one.logits.dtype == one.maps.dtype == np.float32
        np.testing.assert_allclose(one.logits, other.logits, atol=0.02)
        np.testing.assert_allclose(one.maps, other.maps, atol=0.03)
    assert np.abs(one.maps - other.maps).max() > 1e-5
    parity = verify(model, *network(model, "fp16"), report=lambda _: None)
    assert parity["left_out"] == []
    assert parity["figures"]["cam"]["error"] < 0.02
    for one in (engine, reference):
        one.close()


def without(exported, *left_out):
    folder, manifest = exported
    entries = [{"layer": layer, "method": str(method), "reason": "wrong"} for layer, method in left_out]
    graphs = tuple(graph for graph in manifest.graphs if (graph.layer, graph.method) not in left_out)
    return folder, dataclasses.replace(manifest, graphs=graphs, parity={"left_out": entries})


def test_what_was_left_out_is_not_offered():
    exported = network(make(export_networks.Staged))
    wrong = (("first", Method.LAYER_CAM), ("last", Method.X_GRAD_CAM), ("middle", Method.HI_RES_CAM))
    engine = NetworkEngine(read_network(*without(exported, *wrong)), device="cpu", threads=1)
    info = engine.info
    assert info.layers == ("last", "middle", "first")
    assert Method.X_GRAD_CAM not in info.methods
    assert info.layers_of(Method.LAYER_CAM) == ("last", "middle")
    assert info.layers_of(Method.HI_RES_CAM) == ("last", "first")
    # They take the same gradients, and were tried by the default layer alone, or not at all.
    assert info.layers_of(Method.EIGEN_GRAD_CAM) == ("last",)
    assert Method.SMOOTH_GRAD_CAM_PLUS_PLUS not in info.methods
    assert info.layers_of(Method.GRAD_CAM) == info.layers_of(Method.SCORE_CAM) == info.layers

    def can(method, *layers):
        return engine.can(MapSpec(method, layers, upsample=False))

    assert not can(Method.LAYER_CAM, "last", "first")
    assert can(Method.LAYER_CAM, "last", "middle")
    # Torch runs it by the default layer.
    assert (can(Method.X_GRAD_CAM, "last"), can(Method.X_GRAD_CAM, "first")) == (False, True)
    engine.close()


def test_a_layer_of_which_all_was_left_out_is_not_offered():
    exported = network(make(export_networks.Staged))
    wrong = tuple((graph.layer, graph.method) for graph in exported[1].graphs if graph.layer == "middle")
    assert [layer.name for layer in read_network(*without(exported, *wrong)).info.layers] == ["last", "first"]


def test_random_weights_and_changed_layers(tmp_path):
    """What methods of many runs and measures ask of a network."""
    model = make(export_networks.Staged)
    exported = read_network(*network(model))
    engines = [NetworkEngine(one, device="cpu", threads=1) for one in (exported, exported.twin())]
    images, target = noise(1, export_networks.PX), [ClassIds((1,))]
    (own,), (other,) = (
        engine.explain(images, target, MapSpec(Method.GRAD_CAM, ("first",), upsample=False)) for engine in engines
    )
    assert np.abs(own.logits - other.logits).max() > 1e-3
    reference = TorchEngine(model, device="cpu")
    spec = MapSpec(Method.ABLATION_CAM, ("middle",), upsample=False)
    found, expected = (run(engine.steps(images[0], target[0], spec, rows=4)) for engine in (engines[0], reference))
    assert expected.maps.max() == 1
    np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4)
    for engine in (*engines, reference):
        engine.close()


def run(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (export_networks.Baked, "the network cannot be recorded for every batch size"),
        (export_networks.Deciding, "the network cannot be recorded"),
        (export_networks.Repeating, "layer 'middle' runs more than once"),
        (export_networks.Counting, "the network changes its own buffers"),
    ],
)
def test_what_cannot_be_exported(tmp_path, kind, message):
    with pytest.raises(ExportError, match=message):
        export(make(kind), tmp_path)


def test_other_weights_are_found(tmp_path):
    model = make(export_networks.Staged, "last", "first")
    folder, manifest = network(model)
    shutil.copytree(folder, tmp_path / "copy")
    weights = np.fromfile(tmp_path / "copy" / "weights.bin", np.float32)
    weights[np.flatnonzero(weights)[::7]] *= 1.01
    weights.tofile(tmp_path / "copy" / "weights.bin")
    with pytest.raises(ExportError, match=r"forward.onnx, layer last: logits differs from float64 by"):
        verify(model, tmp_path / "copy", manifest, report=lambda _: None)
