"""Detectors that are not torchvision's through a real server: labels, padding, the wrapper that docs/tasks.md shows."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from foreign_detectors import PADDED_PX, letterboxed, padding_of
from heatlens import Client, InvalidArgumentError
from server_process import start_server_process, wait_settled
from task_models import photos

TOML = """
[server]
listen = "127.0.0.1:0"
[[models]]
name = "boxes"
source = "python:foreign_detectors:boxes"
task = "detection"
[[models]]
name = "named"
source = "python:foreign_detectors:boxes"
task = "detection"
layers = ["net"]
labels = "labels.txt"
[[models]]
name = "padded"
source = "python:foreign_detectors:padded"
task = "detection"
layers = ["net"]
[[models]]
name = "detr"
source = "python:own_detectors:boxes"
task = "detection"
labels = "labels.txt"
[models.preprocess]
resize_px = 64
max_side_px = 128
[[models]]
name = "bare"
source = "python:own_detectors:bare"
task = "detection"
"""

# What transformers' DETR returns, of a network that is small enough for a test.
OWN = """
from types import SimpleNamespace


class Detr(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.classes = nn.Linear(8, 4)
        self.corners = nn.Linear(8, 4)

    def forward(self, pixel_values):
        features = self.body(self.stem(pixel_values)).flatten(2).mT
        return SimpleNamespace(logits=4 * self.classes(features), pred_boxes=self.corners(features).sigmoid())


def bare():
    torch.manual_seed(0)
    return Detr()


def boxes():
    return Boxes(bare())
"""


def wrapper() -> str:
    """The code block of docs/tasks.md."""
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Boxes(nn.Module)" in block
    ]
    return code


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection")
    (folder / "own_detectors.py").write_text(wrapper() + OWN)
    (folder / "labels.txt").write_text("nothing\ncat\ndog\n")
    server = start_server_process(folder, TOML)
    wait_settled(server.address)
    with Client(server.address, timeout=60) as made:
        yield made
    server.process.kill()
    server.process.wait()


def test_labels_that_nothing_but_a_file_counts(client):
    by_name = {model.name: model for model in client.models()}
    assert [by_name[name].class_count for name in ("boxes", "named")] == [0, 3]
    assert by_name["boxes"].layers[0] == "net"
    told = " ".join(by_name["boxes"].assumptions)
    assert "Layer 'net' is explained" in told
    assert "how many classes the detector has" in told
    assert not any(word in " ".join(by_name["named"].assumptions) for word in ("Layer", "classes"))
    photo = photos()[0]
    # The file lacks the labels 3 and 4 that the detector finds.
    found = client.explain(photo, model="named", min_score=0).explanations
    assert {item.class_id: item.label for item in found} == {1: "cat", 2: "dog", 3: "", 4: ""}
    assert [
        item.class_id for item in client.explain(photo, model="named", min_score=0, class_ids=["dog"]).explanations
    ] == [2]
    with pytest.raises(InvalidArgumentError, match=r"class id 4 is not in \[0, 3\)"):
        client.explain(photo, model="named", class_ids=4)
    assert client.explain(photo, model="boxes", min_score=0, class_ids=4).explanations[0].label == ""
    assert client.explain(photo, model="boxes", min_score=0, class_ids=9).explanations == ()


def test_maps_of_a_detector_that_pads_lie_on_the_photo(client):
    """As those of the same detector for the photo that was padded before."""
    photo = photos(120, 160)[1]
    height, width, top, left = padding_of((120, 160))
    assert (top, left) == (32, 0)
    image = letterboxed(torch.from_numpy(photo).permute(2, 0, 1) / 255)
    before = np.ascontiguousarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    options = {"min_score": 0, "method": "hi-res-cam", "map_size": "source"}
    theirs = client.explain(before, model="boxes", **options).explanations
    mine = client.explain(photo, model="padded", **options).explanations
    assert [item.class_id for item in mine] == [item.class_id for item in theirs]
    rows = (np.arange(120) * height // 120) + top
    columns = np.arange(160) * width // 160 + left
    compared = 0
    for one, other in zip(mine, theirs, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=2e-3)
        assert one.heatmap.values.shape == (120, 160)
        assert other.heatmap.values.shape == (PADDED_PX, PADDED_PX)
        on_photo = other.heatmap.values[np.ix_(rows, columns)]
        # A peak on the padding is cut off: what is left of it is one row of the map.
        if on_photo.max() == other.heatmap.values.max():
            compared += 1
            assert np.corrcoef(one.heatmap.values.ravel(), on_photo.ravel())[0, 1] > 0.98
    assert compared >= 2


def test_the_wrapper_of_the_documents(client):
    photo = photos(64, 96)[2]
    found = client.explain(photo, model="detr", min_score=0, top_k=2, method="hi-res-cam").explanations
    assert {item.label for item in found} <= {"nothing", "cat", "dog"}
    assert all(item.heatmap.scale > 0 for item in found)
    for item in found:
        assert item.heatmap.values.shape == (8, 12)
        assert item.box.right - item.box.left <= 96
    (bare,) = [model for model in client.models() if model.name == "bare"]
    assert bare.state == "failed"
    assert "docs/tasks.md has a wrapper for others" in bare.state_message
