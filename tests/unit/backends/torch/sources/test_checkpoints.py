"""Checkpoints as training scripts save them: the right weights of each, or a refusal that says what to do."""

import argparse
import pathlib
import sys
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn

from heatlens_server.backends.torch.sources.checkpoints import read_checkpoint
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.backends.torch.sources.sources import load_source
from heatlens_server.backends.torch.sources.weights import weights_version
from heatlens_server.config import ModelConfig
from heatlens_server.core.errors import ModelLoadError


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = make_network()

    def forward(self, x):
        return self.net(x)


def make_network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "zoo", sys.modules[__name__])


def prefixed(prefix, state):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def halved(state):
    return {name: value * 0.5 if value.is_floating_point() else value for name, value in state.items()}


def python_model(path, factory="make_network", **options):
    return ModelConfig(name="m", source=f"python:zoo:{factory}", weights=str(path), **options)


def refusal(path, **options):
    with pytest.raises(ModelLoadError) as caught:
        load_source(python_model(path, **options))
    assert str(path.parent) not in str(caught.value)
    return str(caught.value)


CHECKPOINTS = {
    "plain.pth": lambda s: s,
    "compiled.pth": lambda s: prefixed("_orig_mod.", s),
    "ddp_compiled.pth": lambda s: prefixed("module._orig_mod.", s),
    "lightning.pth": lambda s: {
        "state_dict": prefixed("model.", s),
        "epoch": 3,
        "global_step": 9,
        "hyper_parameters": {"lr": 0.1},
    },
    "lightning_compiled.ckpt": lambda s: {"state_dict": prefixed("net._orig_mod.", s)},
    "torchvision_reference.pth": lambda s: {"model": s, "model_ema": halved(s), "optimizer": {}, "epoch": 1},
    "timm_train.pth": lambda s: {"state_dict": halved(s), "state_dict_ema": s, "arch": "resnet10t"},
    "checkpoint.pth.tar": lambda s: {
        "epoch": 5,
        "arch": "resnet10t",
        "state_dict": prefixed("module.", s),
        "best_acc1": torch.tensor(71.0),
    },
    "model.ckpt": lambda s: s,
    "pytorch_model.bin": lambda s: s,
    "averaged.pt": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.", s)},
    "with_criterion.ckpt": lambda s: {"state_dict": {**prefixed("model.", s), "criterion.weight": torch.ones(7)}},
    "own_prefix.pth": lambda s: {"generator": prefixed("any.thing.", s)},
    "nested.pth": lambda s: {"model_state": {"net": s}, "epoch": 3},
    "compiled_inside.pth": lambda s: {name.replace("layer1.0.", "layer1.0._orig_mod."): s[name] for name in s},
}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", pretrained=False, num_classes=7)


class TestTheSameWeights:
    @pytest.mark.parametrize("name", CHECKPOINTS)
    def test_in_every_form(self, tmp_path, network, name):
        torch.save(CHECKPOINTS[name](network.state_dict()), tmp_path / name)
        sourced = load_source(ModelConfig(name="m", source="timm:resnet10t", weights=str(tmp_path / name)))
        assert weights_version(sourced.module) == weights_version(network)

    @pytest.mark.parametrize(
        ("taken", "other", "assumption"),
        [
            (
                "state_dict_ema",
                "state_dict",
                (
                    "the averaged weights (EMA) under 'state_dict_ema' of 'w.pth' are taken, not those under "
                    "'state_dict': weights_key names others"
                ),
            ),
            (
                "model",
                "model_ema",
                "the weights under 'model' of 'w.pth' are taken, not those under 'model_ema': weights_key names others",
            ),
        ],
    )
    def test_which_of_two_is_said_and_can_be_chosen(self, tmp_path, taken, other, assumption):
        state = make_network().state_dict()
        torch.save({other: halved(state), taken: state}, tmp_path / "w.pth")
        found = load_source(python_model(tmp_path / "w.pth"))
        assert found.assumptions == (assumption,)
        assert weights_version(found.module) == weights_version(make_network())
        chosen = load_source(python_model(tmp_path / "w.pth", weights_key=other))
        assert chosen.assumptions == ()
        assert torch.equal(chosen.module.state_dict()["0.weight"], state["0.weight"] * 0.5)

    def test_of_a_network_inside_another(self, tmp_path):
        state = {name: tensor + 1 for name, tensor in make_network().state_dict().items()}
        torch.save(prefixed("module.", state), tmp_path / "w.pth")
        module = load_source(python_model(tmp_path / "w.pth", factory="Wrapper")).module
        assert torch.equal(module.state_dict()["net.0.weight"], state["0.weight"])

    def test_a_network_whose_own_names_have_the_prefix(self, tmp_path):
        state = {name: tensor + 1 for name, tensor in Wrapper().state_dict().items()}
        torch.save(state, tmp_path / "w.pth")
        module = load_source(python_model(tmp_path / "w.pth", factory="Wrapper")).module
        assert torch.equal(module.state_dict()["net.0.weight"], state["net.0.weight"])

    def test_a_whole_model_loads_and_tells_which_weights(self, tmp_path):
        state = prefixed("model.", make_network().state_dict())
        torch.save({"state_dict": state, "state_dict_ema": state}, tmp_path / "w.ckpt")
        loaded = load_model(python_model(tmp_path / "w.ckpt"))
        assert loaded.class_count == 3
        assert loaded.assumptions[0].startswith("the averaged weights (EMA) under 'state_dict_ema' of 'w.ckpt'")


class TestRefusals:
    def test_a_mismatch_behind_a_prefix(self, tmp_path):
        state = prefixed("model.", make_network().state_dict())
        del state["model.0.bias"]
        state["model.5.weight"] = torch.zeros(5, 4)
        state["model.extra"] = torch.zeros(1)
        torch.save(state, tmp_path / "w.pth")
        assert refusal(tmp_path / "w.pth") == (
            "weights file 'w.pth' does not fit the network of 9 entries: 1 missing (0.bias); 1 not in the network "
            "(extra); 1 of another shape (5.weight (5, 4), the network's (3, 4)); compared without the prefix "
            "'model.' of its names"
        )

    def test_the_network_twice(self, tmp_path):
        state = make_network().state_dict()
        torch.save({**prefixed("student.", state), **prefixed("teacher.", halved(state))}, tmp_path / "w.pth")
        assert "holds the network twice, under 'student.' and 'teacher.'" in refusal(tmp_path / "w.pth")

    def test_a_key_that_is_not_there(self, tmp_path):
        torch.save({"model": make_network().state_dict(), "epoch": 3}, tmp_path / "w.pth")
        assert refusal(tmp_path / "w.pth", weights_key="ema") == (
            "weights_key: weights file 'w.pth' has no 'ema' but {'model': OrderedDict, 'epoch': int}"
        )
        assert refusal(tmp_path / "w.pth", weights_key="epoch") == (
            "weights_key: 'epoch' of weights file 'w.pth' is no state_dict (names to tensors)"
        )

    @pytest.mark.parametrize("more", [argparse.Namespace(lr=0.1), {"path": pathlib.PurePosixPath("run")}])
    def test_what_is_refused_is_named_with_the_line_that_converts_it(self, tmp_path, monkeypatch, more):
        state = make_network().state_dict()
        torch.save({"model": state, "args": more}, tmp_path / "w.pth")
        message = refusal(tmp_path / "w.pth")
        kind = "argparse.Namespace" if isinstance(more, argparse.Namespace) else "pathlib.PurePosixPath"
        assert f"it holds {kind}; save model.state_dict()" in message
        self.run_line(message, tmp_path, monkeypatch)

    def test_a_whole_network_is_named_with_the_line_that_converts_it(self, tmp_path, monkeypatch):
        torch.save(make_network(), tmp_path / "w.pth")
        message = refusal(tmp_path / "w.pth")
        assert "torch.nn.modules." in message
        self.run_line(message, tmp_path, monkeypatch)

    @pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
    def test_torchscript_is_named_with_the_line_that_converts_it(self, tmp_path, monkeypatch):
        torch.jit.trace(make_network().eval(), torch.zeros(1, 3, 8, 8)).save(tmp_path / "w.pth")
        message = refusal(tmp_path / "w.pth")
        assert "it is a TorchScript archive" in message
        self.run_line(message, tmp_path, monkeypatch)

    def test_a_flat_checkpoint_with_other_values(self, tmp_path):
        torch.save({"weight": torch.zeros(1), "epoch": 3}, tmp_path / "w.pth")
        assert "holds no state_dict (names to tensors) but {'weight': Tensor, 'epoch': int}" in refusal(
            tmp_path / "w.pth"
        )

    @staticmethod
    def run_line(message, folder, monkeypatch):
        """Do as the message says; the file that comes out loads."""
        monkeypatch.chdir(folder)
        exec(message.split("`")[1], {"torch": torch})
        converted = load_source(python_model(folder / "tensors.pth"))
        assert weights_version(converted.module) == weights_version(make_network())


def test_safetensors_are_no_pickles(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelLoadError, match="cannot be read as plain tensors"):
        read_checkpoint(tmp_path / "w.safetensors")
