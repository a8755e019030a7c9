"""Files for segmentation and detection through a real server: masks and boxes on the source image."""

import numpy as np
import pytest

import mask_models
from heatlens import Client, InvalidArgumentError
from onnx_files import write_onnx
from server_process import start_server_process, wait_settled
from task_models import photos

PX = 96

TOML = """
[server]
listen = "127.0.0.1:0"
[[models]]
name = "one"
source = "onnx:one.onnx"
labels = "object.txt"
[models.preprocess]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
[[models]]
name = "three"
source = "onnx:three.onnx"
engine = "onnxruntime"
task = "segmentation"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    write_onnx(mask_models.one(), folder / "one.onnx", shape=(1, 3, PX, PX))
    write_onnx(mask_models.three(), folder / "three.onnx", shape=(1, 3, PX, PX))
    (folder / "object.txt").write_text("object\n")
    server = start_server_process(folder, TOML)
    wait_settled(server.address)
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="module")
def client(server):
    with Client(server.address, timeout=60) as made:
        yield made


def test_a_mask_on_the_source_image(client):
    """The photo is twice as wide as high, and the file's input is square: nothing is cut off."""
    photo = photos(64, 128)[0]
    result = client.explain(photo, model="one", return_mask=True, map_size="source")
    (item,) = result.explanations
    assert (item.class_id, item.label) == (0, "object")
    assert item.heatmap.values.shape == item.predicted_mask.shape == (64, 128)
    assert set(np.unique(item.predicted_mask)) == {0, 1}
    assert item.area == pytest.approx(item.predicted_mask.mean(), abs=0.02)


def test_classes_over_a_mask_of_the_request(client):
    photo = photos(64, 128)[1]
    right = np.zeros((64, 128), bool)
    right[:, 64:] = True
    whole, half = (
        client.explain(photo, model="three", class_ids=[0, 2], mask=mask, target_score="log-probability")
        for mask in (np.ones((64, 128), bool), right)
    )
    for one, other in zip(whole.explanations, half.explanations, strict=True):
        assert one.area == other.area
        assert one.logit != pytest.approx(other.logit, abs=1e-3)
    result = client.explain(photo, model="three", top_k=3, return_mask=True, map_size="source")
    shares = [(result.predicted_mask == item.class_id).mean() for item in result.explanations]
    assert shares == sorted(shares, reverse=True)
    with pytest.raises(InvalidArgumentError, match="is for models of detection"):
        client.explain(photo, model="three", min_score=0.5)


def test_what_was_assumed_is_told(server, client):
    models = {model.name: model for model in client.models()}
    assert [models[name].task for name in ("one", "three")] == ["segmentation"] * 2
    assert "taken as those of pixels" in " ".join(models["one"].assumptions)
    assert "exclude each other" in " ".join(models["three"].assumptions)
    assert "cam" not in models["one"].methods
    assert not server.has_torch()
