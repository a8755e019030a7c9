"""Segmentation by sigmoid through a real server: one mask per class, and what ListModels says was assumed."""

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from heatlens import Client
from server_process import start_server_process, wait_settled
from task_models import photos

TOML = """
[server]
listen = "127.0.0.1:0"
[[models]]
name = "one"
source = "python:mask_models:one"
task = "segmentation"
[[models]]
name = "sides"
source = "python:mask_models:sides_of_one"
task = "segmentation"
[[models]]
name = "three"
source = "python:mask_models:three"
task = "segmentation"
activation = "sigmoid"
"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    server = start_server_process(tmp_path_factory.mktemp("segmentation"), TOML)
    wait_settled(server.address)
    yield server.address
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(address):
    with Client(address, timeout=60) as made:
        yield made


def test_one_mask_is_the_object_and_not_the_background(client):
    photo = photos(96, 128)[0]
    (mine,) = client.explain(photo, model="one", return_mask=True).explanations
    result = client.explain(photo, model="sides", class_ids=1, return_mask=True)
    (their,) = result.explanations
    assert (mine.class_id, their.predicted_mask) == (0, None)
    np.testing.assert_allclose(mine.heatmap.values, their.heatmap.values, atol=1e-5)
    assert (mine.logit, mine.probability, mine.area) == pytest.approx((their.logit, their.probability, their.area))
    np.testing.assert_array_equal(mine.predicted_mask, result.predicted_mask)
    assert mine.area == pytest.approx(mine.predicted_mask.mean())


def test_masks_of_classes_that_overlap_on_the_source_image(client):
    photo = photos(96, 128)[1]
    result = client.explain(photo, model="three", class_ids=[2, 0], return_mask=True, map_size="source")
    assert result.predicted_mask is None
    assert [item.class_id for item in result.explanations] == [2, 0]
    for item in result.explanations:
        assert item.predicted_mask.shape == (96, 128)
        assert item.area == pytest.approx(item.predicted_mask.mean())
    assert (sum(item.predicted_mask for item in result.explanations) == 2).any()
    plain = client.explain(photo, model="three", class_ids=[2, 0]).explanations
    assert [item.predicted_mask for item in plain] == [None, None]


def test_what_was_assumed_is_told(client):
    by_name = {model.name: model for model in client.models()}
    assert "one output channel" in " ".join(by_name["one"].assumptions)
    assert "exclude each other" in " ".join(by_name["sides"].assumptions)
    assert by_name["three"].class_count == 3
    assert not any(word in " ".join(by_name["three"].assumptions) for word in ("channel", "exclude"))


@pytest.mark.parametrize("model", ["sides", "three"])
def test_a_mask_that_the_command_line_writes_is_one_that_it_takes(run, address, client, tmp_path, model):
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), photos(96, 128)[1])

    def explain(*options):
        done = run("explain", photo, "--server", address, "--model", model, "--class", 1, "--json", *options)
        return json.loads(done.stdout)

    told = explain("--return-mask", "-o", tmp_path)
    (item,) = told["explanations"]
    overlapping = model == "three"
    path, other = told["predicted_mask"], item["predicted_mask"]
    if overlapping:
        path, other = other, path
    assert other is None
    with Image.open(path) as written:
        mask = np.asarray(written)
    assert mask.shape == (96, 128)
    assert (mask == 1).mean() == pytest.approx(item["area"])
    # Over the pixels of the class it is explained in any case.
    (again,) = explain("--mask", path)["explanations"]
    assert again["logit"] == pytest.approx(item["logit"], abs=1e-4)
    everywhere = client.explain(photo, model=model, class_ids=1, mask=np.ones((96, 128), bool)).explanations[0]
    assert everywhere.logit != pytest.approx(item["logit"], abs=1e-2)
