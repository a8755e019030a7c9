"""What is written into an export's folder, and what its manifest says about it."""

import shutil
from dataclasses import replace

import pytest

import export_networks
from export_networks import make
from heatlens_server.backends.onnx.manifest import read_manifest, sha256_of
from heatlens_server.backends.torch.export.folder import export_graph, without_left_out
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, GraphSpec, InputKind, Output
from heatlens_server.core.methods import Method
from loaded_models import bundle, network, user_export


def test_manifest_of_one_graph(tmp_path):
    model = make(export_networks.Staged)
    spec = GraphSpec("last", Method.LAYER_CAM, classes=2, outputs=(Output.LOGITS, Output.CAM), input=InputKind.UINT8)
    phases = []
    manifest = export_graph(
        model, spec, file_format=Format.TORCHSCRIPT, source="python:x:y", folder=tmp_path, report=phases.append
    )
    assert phases == ["differentiating test by last", "writing test.ts"]
    assert [path.name for path in tmp_path.iterdir()] == ["test.ts"]
    assert manifest.files == {"test.ts": sha256_of(tmp_path / "test.ts")}
    (graph,) = manifest.graphs
    assert (graph.file, graph.layer, graph.method, graph.outputs) == ("test.ts", "last", spec.method, spec.outputs)
    assert (manifest.source, manifest.weights_version) == ("python:x:y", weights_version(model.module))
    assert (manifest.classes, manifest.input, manifest.precision) == (2, InputKind.UINT8, "fp32")
    assert (manifest.opset, manifest.parity) == (None, {})
    assert [(info.name, info.dtype, info.shape) for info in (*manifest.inputs, *manifest.outputs)] == [
        ("image", "uint8", ("batch", 3, export_networks.PX, export_networks.PX)),
        ("class_index", "int64", ("batch", 2)),
        ("logits", "float32", ("batch", export_networks.CLASSES)),
        ("cam", "float32", ("batch", 2, 4, 4)),
    ]
    assert all(info.meaning for info in (*manifest.inputs, *manifest.outputs))
    assert {"heatlens", "torch", "onnx"} <= set(manifest.versions)
    manifest.write(tmp_path)
    assert read_manifest(tmp_path) == manifest


def test_any_number_of_classes_has_a_name():
    _, manifest = user_export(make(export_networks.Staged), Format.PT2, GraphSpec("last", classes=None))
    assert {info.name: info.shape for info in manifest.outputs}["gradients"] == ("batch", "classes", 12, 4, 4)
    assert manifest.inputs[1].shape == ("batch", "classes")


def test_a_server_s_torchscript_export_has_a_file_for_each_layer():
    model = make(export_networks.Staged, "last", "first")
    _, manifest = bundle(model)
    assert list(dict.fromkeys(graph.file for graph in manifest.graphs)) == ["layer-0.ts", "layer-1.ts"]
    assert manifest.layers == ("last", "first")
    assert {graph.outputs for graph in manifest.graphs} == {tuple(Output)[:4]}
    assert {info.name: info.shape for info in manifest.outputs}["activations"] == ("batch", 12, 4, 4)


@pytest.mark.parametrize("export", [network, bundle])
def test_what_is_left_out_is_not_in_the_manifest(tmp_path, export):
    folder, manifest = export(make(export_networks.Staged, "last", "first"))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    parity = {"left_out": [{"layer": "first", "method": "layer-cam", "reason": "cam differs by 0.5"}]}
    left = without_left_out(manifest, parity, tmp_path)
    assert set(manifest.graphs) - set(left.graphs) == {
        graph for graph in manifest.graphs if (graph.layer, graph.method) == ("first", Method.LAYER_CAM)
    }
    # Its file has other methods too.
    assert set(manifest.files) == set(left.files) == {path.name for path in tmp_path.iterdir()}
    replace(left, parity=parity).write(tmp_path)
    again = read_manifest(tmp_path)
    assert [(entry.layer, entry.method, entry.reason) for entry in again.left_out] == [
        ("first", Method.LAYER_CAM, "cam differs by 0.5")
    ]
    assert manifest.left_out == ()


def test_a_file_of_which_all_is_left_out_is_removed(tmp_path):
    folder, manifest = bundle(make(export_networks.Staged, "last", "first"))
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    entries = [
        {"layer": "first", "method": graph.method, "reason": "wrong"}
        for graph in manifest.graphs
        if graph.layer == "first"
    ]
    left = without_left_out(manifest, {"left_out": entries}, tmp_path)
    assert left.layers == ("last",)
    assert set(left.files) == {"layer-0.ts"} == {path.name for path in tmp_path.iterdir()}


def test_a_model_that_cannot_be_exported_leaves_no_file(tmp_path):
    with pytest.raises(ExportError, match="the network cannot be recorded for every batch size"):
        export_graph(
            make(export_networks.Baked),
            GraphSpec("last"),
            file_format=Format.TORCHSCRIPT,
            source="x",
            folder=tmp_path,
            report=lambda _: None,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong", [{"classes": 0}, {"precision": "bf16"}, {"outputs": ()}, {"outputs": (Output.CAM, Output.LOGITS)}]
)
def test_impossible_specs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GraphSpec("last", **wrong)
