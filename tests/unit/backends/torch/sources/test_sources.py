"""What sources ask torchvision for, where building the real network would take gigabytes."""

import pytest
import torch
import torchvision
from torch import nn

from heatlens_server.backends.torch.sources.sources import load_source
from heatlens_server.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "file", "size_px"),
    [
        ("vit_h_14", None, 518),
        ("vit_b_16", None, 224),
        ("vit_b_16", "vit_b_16_swag-9ac1b537.pth", 384),
        ("vit_b_16", "own.pth", 224),
    ],
)
def test_vision_transformers_are_built_for_the_size_of_their_input(monkeypatch, tmp_path, name, file, size_px):
    built = []

    def get_model(_name, **options):
        built.append(options)
        return nn.Linear(2, 1000)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    weights = "none"
    if file is not None:
        torch.save(nn.Linear(2, 1000).state_dict(), tmp_path / file)
        weights = str(tmp_path / file)
    sourced = load_source(ModelConfig(name="m", source=f"torchvision:{name}", weights=weights))
    assert {options["image_size"] for options in built} == {size_px}
    assert sourced.preprocess.crop_px == (size_px, size_px)
