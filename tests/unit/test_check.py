"""What `heatlens-server check` reports of a model."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from heatlens_server import check, cli
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import Capabilities
from heatlens_server.core.methods import Method
from heatlens_server.core.preprocess import Interpolation, PreprocessSpec
from heatlens_server.core.results import ImageResult

PREPROCESS = PreprocessSpec(
    resize_px=256,
    crop_px=(224, 224),
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    interpolation=Interpolation.BILINEAR,
)


@pytest.mark.parametrize(("size_px", "said"), [((32, 64), "64x32 px"), ((0, 0), "any size")])
def test_the_size_of_a_models_input(monkeypatch, size_px, said):
    info = Capabilities("torch", "cpu", "fp32", *size_px, 1, (Method.GRAD_CAM,), ("body",))
    one = np.ones(1, np.float32)
    result = ImageResult(one, (0,), np.ones((1, 2, 2), np.float32), one, one)
    closed = []
    engine = SimpleNamespace(info=info, explain=lambda *_: [result], close=lambda: closed.append(True))
    model = SimpleNamespace(
        engine=engine,
        engines=(engine,),
        close=engine.close,
        assumptions=("one output: taken as binary",),
        preprocess=PREPROCESS,
        layer_choices=(),
        next_engine="",
    )
    monkeypatch.setattr(check, "build", lambda *_args, **_kwargs: model)
    lines: list[str] = []
    assert check.check_model(ModelConfig(name="m", source="torchvision:resnet18"), lines.append, cache_dir=None)
    assert lines == [
        "m: one output: taken as binary",
        "m: activation: softmax",
        f"m: preprocess: {PREPROCESS.in_words()}",
        f"m: ok: torch on cpu in fp32, classification, {said}, 1 classes, layers body; methods grad-cam, refine-cam",
    ]
    assert closed


def test_preprocessing_in_the_words_of_the_configuration():
    words = PREPROCESS.in_words()
    assert words.startswith("resize_px = 256, crop_px = [224, 224], mean = [0.5, 0.5, 0.5], std = [0.25, 0.25, 0.25]")
    assert 'interpolation = "bilinear"' in words


NET = """
from torch import is_grad_enabled, nn


def broken():
    raise KeyError("MODEL_DIR")


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 32, 32), nn.Linear(4, 2)

    def forward(self, x):
        if is_grad_enabled():
            raise RuntimeError("only without gradients")
        return self.head(self.body(x).mean((2, 3)))


def sound():
    return nn.Sequential(nn.Conv2d(3, 4, 32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
"""


def test_every_model_is_looked_at_and_the_reason_of_each_failure_told(tmp_path, monkeypatch):
    (tmp_path / "net_of_check.py").write_text(NET)
    (tmp_path / "server.toml").write_text(
        "".join(
            f'[[models]]\nname = "{name}"\nsource = "python:net_of_check:{name}"\nengine = "torch"\n'
            for name in ("broken", "Failing", "sound")
        )
    )
    monkeypatch.setenv("HEATLENS_SERVER__CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "net_of_check", raising=False)
    found = CliRunner().invoke(cli.app, ["check", "--config", str(tmp_path / "server.toml")])
    assert found.exit_code == 1
    assert f"KeyError: 'MODEL_DIR' ({tmp_path}/net_of_check.py, line 6, in broken)" in found.stderr
    # Unexpected: the network failed with gradients, after it ran without.
    assert f'File "{tmp_path}/net_of_check.py", line 16, in forward' in found.stderr
    assert "RuntimeError: only without gradients" in found.stderr
    assert "sound: ok: " in found.stderr
