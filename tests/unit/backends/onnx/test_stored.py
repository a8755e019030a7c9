"""Stored networks: read without torch and onnx, right by any layers, and what is wrong with them."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models
from export_networks import PX
from heatlens_server.backends.onnx import graph_network
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network
from heatlens_server.backends.torch.engine import TorchEngine
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format, GraphSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import ClassIds, TopK
from loaded_models import loaded, network, noise, user_export

SPEC = MapSpec(Method.GRAD_CAM, ("body",), upsample=False)


def tiny():
    return network(loaded(tiny_models.tiny(), ("body", "stem")))


def open_engine(exported, **options):
    return NetworkEngine(read_network(*exported), **{"device": "cpu", "threads": 1, **options})


PROGRAM = """
import sys
sys.modules.update(dict.fromkeys(["torch", "torchvision", "timm", "onnx", "onnx_ir", "onnxscript"]))
from pathlib import Path
import numpy as np
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.targets import TopK
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.stored import read_network

folder = Path(sys.argv[1])
engine = NetworkEngine(read_network(folder, read_manifest(folder)), device="cpu", threads=1)
images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
for method in engine.info.methods:
    spec = MapSpec(method, ("body",), True)
    steps = engine.steps(images[0], TopK(1), spec, rows=4)
    found = [next(steps)] if spec.in_steps else engine.explain(images, [TopK(2)] * 2, spec)
"""


def test_neither_torch_nor_onnx_is_needed(tmp_path):
    folder, manifest = tiny()
    manifest.write(shutil.copytree(folder, tmp_path / "copy"))
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path / "copy")], check=True)


def test_its_folder_is_only_read(tmp_path):
    folder, manifest = tiny()
    manifest.write(shutil.copytree(folder, tmp_path / "copy"))

    def files():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}

    before = files()
    engine = open_engine((tmp_path / "copy", manifest))
    for layer in ("body", "stem"):
        assert engine.explain(noise(2), [TopK(2)] * 2, dataclasses.replace(SPEC, layers=(layer,)))
    engine.close()
    assert files() == before


def test_what_bypasses_a_layer_is_computed_before_it():
    class Bypassed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.body = nn.Conv2d(3, 6, 3, stride=4), nn.Conv2d(6, 6, 3, padding=1)
            self.head = nn.Linear(6, 7)

        def forward(self, x):
            x = self.stem(x)
            return self.head((self.body(x).relu() * x.sigmoid()).mean((-2, -1)))

    torch.manual_seed(0)
    model = loaded(Bypassed(), ("body", "stem"), class_count=7, px=PX)
    engine, reference = open_engine(network(model)), TorchEngine(model, device="cpu")
    image = noise(1, PX)[0]
    for method in (Method.ABLATION_CAM, Method.SCORE_CAM):
        spec = MapSpec(method, ("body",), upsample=False)
        found, expected = (finished(one.steps(image, ClassIds((1,)), spec, rows=3)) for one in (engine, reference))
        assert expected.maps.max() == 1
        np.testing.assert_allclose(found.maps, expected.maps, atol=1e-4)
    engine.close()
    reference.close()


def finished(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


class Resizing(nn.Module):
    """Enlarges two maps by two matrices: each backward pass begins with another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 7)

    def forward(self, x):
        x = self.stem(x)
        large = nn.functional.interpolate(self.body(x).relu(), (32, 32), mode="bilinear")
        small = nn.functional.interpolate(x.sigmoid(), (24, 24), mode="bilinear")
        return self.head(large.square().mean((-2, -1)) + small.square().mean((-2, -1)))


def test_files_that_are_overwritten_change_nothing_of_a_network_that_was_read(tmp_path):
    source, manifest = tiny()
    folder = Path(shutil.copytree(source, tmp_path / "export"))
    engine, reference = (open_engine((one, manifest)) for one in (folder, source))
    for file in folder.iterdir():
        # In place: what is mapped from a file that becomes shorter kills the process.
        file.write_bytes(b"another")
    for layer in ("body", "stem"):
        asked = noise(1), [TopK(1)], MapSpec(Method.GRAD_CAM, (layer,), upsample=False)
        (one,), (other,) = engine.explain(*asked), reference.explain(*asked)
        np.testing.assert_array_equal(one.maps, other.maps)
    engine.close()
    reference.close()


def test_constants_of_backward_passes_are_kept_apart():
    torch.manual_seed(0)
    model = loaded(Resizing(), ("body", "stem"), class_count=7)
    stored = read_network(*network(model))
    matrices = [name.split(": ")[0] for name in stored.weights if "gradient_constant" in name]
    assert {name: matrices.count(name) for name in set(matrices)} == {"backward-1.onnx": 2, "backward-2.onnx": 4}
    engine, reference = NetworkEngine(stored, device="cpu", threads=1), TorchEngine(model, device="cpu")
    for layer in ("body", "stem"):
        asked = noise(2), [TopK(2)] * 2, MapSpec(Method.HI_RES_CAM, (layer,), upsample=False)
        for one, other in zip(engine.explain(*asked), reference.explain(*asked), strict=True):
            assert other.maps.max() == 1
            np.testing.assert_allclose(one.maps, other.maps, atol=1e-4)
    engine.close()
    reference.close()


def test_a_folder_for_people_holds_each_weight_once():
    model = loaded(tiny_models.tiny_mlp())
    folder, manifest = user_export(model, Format.ONNX, GraphSpec("body", Method.LAYER_CAM, 2))
    network = read_network(folder, manifest)
    assert {place["file"] for place in network.content["weights"].values()} == {"test.onnx"}
    assert not (folder / "weights.bin").exists()
    assert all(array.flags.aligned for array in network.weights.values())
    engine, reference = NetworkEngine(network, device="cpu", threads=1), TorchEngine(model, device="cpu")
    for method in (Method.LAYER_CAM, Method.EIGEN_CAM):
        asked = noise(5), [TopK(3), ClassIds((4,)), TopK(1), ClassIds((1, 2)), TopK(10)], SPEC
        asked = (*asked[:2], dataclasses.replace(SPEC, method=method))
        for one, other in zip(engine.explain(*asked), reference.explain(*asked), strict=True):
            assert one.class_ids == other.class_ids
            np.testing.assert_allclose(one.maps, other.maps, atol=1e-5)
    engine.close()
    reference.close()


def test_only_so_many_sessions_are_kept(monkeypatch):
    opened = []
    real = graph_network.open_packed
    monkeypatch.setattr(
        graph_network, "open_packed", lambda *args, **options: opened.append(1) or real(*args, **options)
    )
    engine = open_engine(tiny())
    assert len(opened) == 2
    for _ in range(2):
        engine.explain(noise(1), [TopK(1)], SPEC)
        engine.explain(noise(1), [TopK(1)], dataclasses.replace(SPEC, layers=("stem",)))
    assert len(opened) == 4
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="the engine is closed"):
        engine.explain(noise(1), [TopK(1)], SPEC)


def test_failures_of_memory_are_told_from_others(monkeypatch):
    engine = open_engine(tiny())
    with pytest.raises(Exception, match="Got invalid dimensions") as caught:
        engine.explain(noise(1, px=32), [TopK(1)], SPEC)
    assert not isinstance(caught.value, MemoryError)
    # And it is still usable.
    assert engine.explain(noise(1), [TopK(1)], SPEC)[0].maps.shape == (1, 8, 8)

    def fail(*_args):
        raise RuntimeError("Failed to allocate memory for requested buffer of size 1")

    monkeypatch.setattr(graph_network.OpenGraph, "run", fail)
    with pytest.raises(MemoryError):
        engine.explain(noise(1), [TopK(1)], SPEC)
    engine.close()


def test_a_damaged_graph_fails_at_load_without_naming_paths(tmp_path):
    folder, manifest = tiny()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "forward.onnx").write_bytes((folder / "forward.onnx").read_bytes().replace(b"Conv", b"Covn"))
    with pytest.raises(ModelLoadError, match="onnxruntime cannot open the file") as caught:
        open_engine((tmp_path / "copy", manifest))
    assert str(tmp_path) not in str(caught.value)


def test_missing_devices_are_said():
    with pytest.raises(ModelLoadError, match="no device 'cuda:99'"):
        open_engine(tiny(), device="cuda:99")
    with pytest.raises(ModelLoadError, match="provider 'cuda' does not run on device 'cpu'"):
        open_engine(tiny(), provider="cuda")


def test_a_manifest_is_read_with_its_network(tmp_path):
    folder, manifest = tiny()
    manifest.write(shutil.copytree(folder, tmp_path / "copy"))
    assert read_manifest(tmp_path / "copy") == manifest
    info = read_network(tmp_path / "copy", manifest).info
    assert [(layer.name, layer.channels, layer.height) for layer in info.layers] == [("body", 16, 8), ("stem", 8, 16)]
    assert (info.class_count, info.dtype, info.takes_batches, info.has_linear_head) == (10, "float32", True, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_count": 7}, "logits is of shape .* class_count 7 does not fit"),
        ({"crop_px": (32, 32)}, r"image is of shape .* preprocess.crop_px \(3, 32, 32\) does not fit"),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_fails_at_load(changes, message):
    folder, manifest = tiny()
    if "crop_px" in changes:
        changes = {"preprocess": dataclasses.replace(manifest.preprocess, **changes)}
    with pytest.raises(ModelLoadError, match=message):
        open_engine((folder, dataclasses.replace(manifest, **changes)))
