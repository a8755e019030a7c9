"""What is written about an export, and how its reading fails."""

import json
import os
from dataclasses import replace

import pytest

from heatlens_server.backends.onnx.manifest import (
    MANIFEST_FILE,
    GraphFile,
    Manifest,
    TensorInfo,
    read_manifest,
    sha256_of,
)
from heatlens_server.core.errors import ExportError
from heatlens_server.core.graph_spec import Format, InputKind, Output
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.tasks import Task


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"weights" * 300_000)
    manifest = Manifest(
        format=Format.ONNX,
        model="net",
        source="torchvision:resnet18",
        weights_version="0123456789ab",
        class_count=2,
        labels=("crab", "Käse"),
        preprocess=PreprocessSpec((40, 50), (32, 48), (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), Interpolation.LANCZOS),
        input=InputKind.UINT8,
        precision="fp16",
        classes=None,
        graphs=(
            GraphFile("net.onnx", "layer4", Method.HI_RES_CAM, (Output.LOGITS, Output.CAM)),
            GraphFile("net.onnx", "layer3", Method.HI_RES_CAM, (Output.LOGITS, Output.CAM)),
            GraphFile("net.onnx", "layer4", Method.CAM, (Output.LOGITS, Output.CAM)),
        ),
        inputs=(TensorInfo("image", "uint8", ("batch", 3, 32, 48), "RGB pixels"),),
        outputs=(TensorInfo("cam", "float32", ("batch", "classes", 2, 3), "map"),),
        files={"net.onnx": sha256_of(tmp_path / "net.onnx")},
        opset=20,
        versions={"torch": "2.14.1"},
        parity={"figures": {"cam": {"error": 1e-6}}},
        task=Task.MULTI_LABEL,
    )
    manifest.write(tmp_path)
    return tmp_path, manifest


@pytest.mark.parametrize("name", ["net.onnx", MANIFEST_FILE])
def test_a_fifo_is_refused_and_not_waited_for(folder, name):
    path, _ = folder
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(ExportError, match=f"{name} cannot be read"):
        read_manifest(path)


def test_what_is_written_is_read(folder):
    path, manifest = folder
    assert read_manifest(path) == manifest
    assert read_manifest(path).layers == ("layer4", "layer3")
    shorter = replace(manifest, preprocess=replace(manifest.preprocess, resize_px=48), classes=1, labels=())
    shorter.write(path)
    assert read_manifest(path) == shorter


def test_it_is_readable_without_us(folder):
    path, _ = folder
    content = json.loads((path / MANIFEST_FILE).read_text())
    assert content["manifest_version"] == 1
    assert content["task"] == "multi-label-classification"
    assert content["preprocess"]["crop_px"] == [32, 48]
    assert content["graphs"][0] == {
        "file": "net.onnx",
        "layer": "layer4",
        "method": "hi-res-cam",
        "outputs": ["logits", "cam"],
        "grid": {"layout": "map", "prefix": 0, "height": 0, "width": 0},
        "score": "logit",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / MANIFEST_FILE).unlink(), "manifest.json cannot be read"),
        (lambda path: (path / MANIFEST_FILE).write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / MANIFEST_FILE).write_text("[]"), "manifest.json is damaged"),
        (lambda path: (path / MANIFEST_FILE).write_bytes(b"\xff\xfe"), "manifest.json is damaged"),
        (lambda path: edit(path, manifest_version=2), "manifest.json is of another version"),
        (lambda path: edit(path, labels=None), "manifest.json is damaged"),
        (lambda path: edit(path, surprise=1), "manifest.json is damaged"),
        (lambda path: edit(path, format="exe"), "manifest.json is damaged"),
        (lambda path: edit(path, task="detection"), "exports are of classifiers, not for detection"),
        (lambda path: edit(path, task="guessing"), r"manifest.json is damaged \(task: "),
        (lambda path: edit(path, preprocess={"resize_px": 1}), "manifest.json is damaged"),
        (lambda path: edit(path, files={"../net.onnx": "0"}), "names a file outside of its folder"),
        (lambda path: edit(path, files={}), "a graph without a file"),
        (lambda path: edit(path, files={"net.onnx": 1}), "files.net.onnx: "),
        (lambda path: edit(path, class_count="2"), "class_count: "),
        (lambda path: edit(path, class_count=True), "class_count: "),
        (lambda path: edit(path, class_count=0), "class_count: "),
        (lambda path: edit(path, labels=["crab"]), "labels: there are 1, for 2 classes"),
        (lambda path: edit(path, labels=[1, 2]), "labels.0: "),
        (lambda path: edit(path, precision="bf16"), "precision: "),
        (lambda path: edit(path, classes="abc"), "classes: "),
        (lambda path: edit(path, classes=0), "classes: "),
        (lambda path: edit(path, classes=3), "classes: 3 of 2"),
        (lambda path: edit(path, graphs=[]), "graphs: "),
        (lambda path: edit_graph(path, layer=""), "graphs.0.layer: "),
        (lambda path: edit_graph(path, method="magic"), "graphs.0.method: "),
        (lambda path: edit_preprocess(path, mean=[0.5]), "preprocess: .*mean and std must be of one length"),
        (lambda path: edit_preprocess(path, mean=["x", "y", "z"]), "preprocess.mean.0: "),
        (lambda path: edit_preprocess(path, std=[0, 0, 0]), "preprocess: .*std positive"),
        (lambda path: edit_preprocess(path, std=[float("nan")] * 3), "preprocess: .*must be finite"),
        (lambda path: edit_preprocess(path, resize_px=-5), "preprocess: .*at least 1"),
        (lambda path: edit_preprocess(path, crop_px=[32]), "preprocess.crop_px"),
        (lambda path: edit_preprocess(path, crop_px=[16, 16]), "preprocess.crop_px: .* and the graphs take"),
        (lambda path: edit_preprocess(path, crop_px=[10**6] * 2, resize_px=10**6), "crop_px: more than"),
        (lambda path: edit(path, input="float"), "input: float, and the graphs take uint8"),
        (lambda path: edit(path, weights_version=5), "weights_version: "),
        (lambda path: (path / "net.onnx").unlink(), "net.onnx cannot be read"),
        (lambda path: (path / "net.onnx").write_bytes(b"other"), "net.onnx is not the file that was exported"),
        (lambda path: flip_a_bit(path / "net.onnx"), "net.onnx is not the file that was exported"),
    ],
)
def test_damage_is_told_without_a_path(folder, change, message):
    path, _ = folder
    change(path)
    with pytest.raises(ExportError, match=message) as caught:
        read_manifest(path)
    assert str(path) not in str(caught.value)


def edit(path, **changes):
    content = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps({**content, **changes}))


def edit_graph(path, **changes):
    first, *others = json.loads((path / MANIFEST_FILE).read_text())["graphs"]
    edit(path, graphs=[{**first, **changes}, *others])


def edit_preprocess(path, **changes):
    edit(path, preprocess={**json.loads((path / MANIFEST_FILE).read_text())["preprocess"], **changes})


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
