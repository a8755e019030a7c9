"""Names of exports: everything that decides what is in them, and nothing else."""

import importlib
import os
import subprocess
import sys

import pytest

import tiny_models
from heatlens_server.backends.onnx import manifest
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.graph_spec import Format
from heatlens_server.fleet import cache_key as key_module
from heatlens_server.fleet.cache_key import export_key, is_settled
from loaded_models import loaded


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(b"weights")
    return path


def config(**changes):
    return ModelConfig(**{"name": "m", "source": "embedded:efficientnet_lite0", **changes})


def key(file_format=Format.ONNX, **changes):
    return export_key(config(**changes), file_format)


def test_the_same_model_has_the_same_key_whatever_it_is_called(tmp_path):
    (tmp_path / "labels.txt").write_text("a\n")
    assert len(key()) == 32
    assert key(name="other", version="7", method="layer-cam", labels=tmp_path / "labels.txt", device="cpu") == key()


def test_everything_that_changes_an_export_changes_its_key(weights, monkeypatch):
    def from_file():
        return key(source="torchvision:resnet18", weights=str(weights))

    keys = [
        key(),
        key(Format.TORCHSCRIPT),
        key(layers=("bn2",)),
        key(layers=("bn2", "bn1")),
        key(layers=("bn1", "bn2")),
        key(precision="fp16"),
        key(preprocess={"crop_px": 192}),
        key(preprocess={"mean": [0.5, 0.5, 0.5]}),
        key(source="torchvision:resnet18"),
        key(source="torchvision:resnet34"),
        key(source="torchvision:resnet18", weights="IMAGENET1K_V1"),
        from_file(),
        key(source="torchvision:resnet18", weights=str(weights), weights_key="model_ema"),
    ]
    weights.write_bytes(b"weightS")
    keys.append(from_file())
    monkeypatch.setattr(manifest, "version", lambda package: f"{package} 9")
    keys.append(key())
    monkeypatch.setattr(key_module, "_own_sources", lambda: "changed")
    keys.append(key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet10t", "python:a.b:c"])
def test_a_weights_file_is_known_by_its_content(weights, tmp_path, source):
    (tmp_path / "elsewhere").mkdir()
    again = weights.rename(tmp_path / "elsewhere" / "last epoch.pth")
    moved = key(source=source, weights=str(again))
    assert key(source=source, weights=str(again.rename(weights))) == moved
    weights.write_bytes(b"other weights")
    assert key(source=source, weights=str(weights)) != moved


def test_a_file_of_torchvision_s_own_is_known_by_its_name_too(weights, tmp_path):
    """It brings the preprocessing that it was trained with."""
    plain = key(source="torchvision:resnet18", weights=str(weights))
    own = weights.rename(tmp_path / "resnet18-f37072fd.pth")
    assert key(source="torchvision:resnet18", weights=str(own)) != plain
    timm = key(source="timm:resnet18", weights=str(own))
    assert key(source="timm:resnet18", weights=str(own.rename(weights))) == timm


def test_a_weights_file_that_is_gone_is_named_without_its_folder(weights):
    model = config(source="timm:resnet10t", weights=str(weights))
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"^weights file 'w\.pth' cannot be read$"):
        export_key(model, Format.ONNX)


@pytest.mark.parametrize(
    ("source", "weights", "expected"),
    [
        ("embedded:efficientnet_lite0", "default", True),
        ("torchvision:resnet18", "default", True),
        ("torchvision:resnet18", "IMAGENET1K_V1", True),
        ("torchvision:resnet18", "none", False),
        ("torchvision:resnet18", "file", True),
        ("timm:resnet10t", "default", False),
        ("timm:resnet10t", "none", False),
        ("timm:resnet10t", "file", True),
        ("python:a.b:c", "default", False),
        ("python:a.b:c", "file", False),
    ],
)
def test_which_models_are_known_without_loading_them(tmp_path, source, weights, expected):
    (tmp_path / "w.pth").touch()
    named = str(tmp_path / "w.pth") if weights == "file" else weights
    assert is_settled(config(source=source, weights=named)) is expected


def test_a_loaded_models_weights_layers_and_code_enter_its_key(tmp_path, monkeypatch):
    source = config(source="python:zoo_of_keys:Net")

    def key_of(model):
        return export_key(source, Format.ONNX, model)

    monkeypatch.syspath_prepend(tmp_path)
    text = "from tiny_models import Tiny\nclass Net(Tiny):\n    pass\n"
    (tmp_path / "zoo_of_keys.py").write_text(text)
    zoo = importlib.import_module("zoo_of_keys")
    module = zoo.Net()
    module.load_state_dict(tiny_models.tiny().state_dict())
    keys = [key_of(loaded(module)), key_of(loaded(module, ("body", "stem"))), key_of(loaded(tiny_models.tiny()))]
    os.utime(tmp_path / "zoo_of_keys.py", (0, 0))
    assert key_of(loaded(module)) == keys[0]
    (tmp_path / "zoo_of_keys.py").write_text(text + "# changed\n")
    keys.append(key_of(loaded(module)))
    module.head.bias.data += 1
    keys.append(key_of(loaded(module)))
    assert len(set(keys)) == len(keys)


def test_naming_and_building_load_no_torch():
    program = (
        "import sys; from heatlens_server.fleet import build, cache_key; from heatlens_server.config import Config; "
        "cache_key.export_key(Config().models[0], 'onnx'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
