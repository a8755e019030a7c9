"""Segmentation by sigmoid through a real server: one mask per class, and what ListModels says was assumed."""

import numpy as np
import pytest

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
def client(tmp_path_factory):
    server = start_server_process(tmp_path_factory.mktemp("segmentation"), TOML)
    wait_settled(server.address)
    with Client(server.address, timeout=60) as made:
        yield made
    server.process.kill()
    server.process.wait()


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
    assert (by_name["three"].class_count, by_name["three"].assumptions) == (3, ())
