"""Files for segmentation and detection through a real server: masks and boxes on the source image."""

import numpy as np
import onnx
import pytest

import box_networks
import mask_models
from box_networks import Detr, YoloV8, made
from heatlens import Client, InvalidArgumentError
from heatlens_server.backends.onnx.network_engine import NetworkEngine
from heatlens_server.backends.onnx.source.load import load_file
from heatlens_server.config import ModelConfig
from heatlens_server.core.engine import MapSpec
from heatlens_server.core.methods import Method
from heatlens_server.core.targets import Detections
from heatlens_server.imaging.preprocess import fit
from onnx_files import write_onnx
from server_process import start_server_process, wait_settled
from task_models import photos

PX = 96
NAMES = ("cat", "dog", "bird")

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
[[models]]
name = "yolo"
source = "onnx:yolo.onnx"
[[models]]
name = "detr"
source = "onnx:detr.onnx"
activation = "softmax"
task = "detection"
[models.preprocess]
mean = [0.5]
std = [0.5]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("places")


@pytest.fixture(scope="module")
def server(folder):
    write_onnx(mask_models.one(), folder / "one.onnx", shape=(1, 3, PX, PX))
    write_onnx(mask_models.three(), folder / "three.onnx", shape=(1, 3, PX, PX))
    (folder / "object.txt").write_text("object\n")
    write_onnx(made(YoloV8, 3.0), folder / "yolo.onnx", shape=(1, 3, box_networks.PX, box_networks.PX))
    model = onnx.load(folder / "yolo.onnx")
    for key, value in {"task": "detect", "imgsz": "[64, 64]", "names": str(dict(enumerate(NAMES)))}.items():
        model.metadata_props.add(key=key, value=value)
    onnx.save(model, folder / "yolo.onnx")
    write_onnx(
        made(Detr, 3.0), folder / "detr.onnx", shape=(1, 3, box_networks.PX, box_networks.PX), names=("logits", "boxes")
    )
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


def test_boxes_on_the_source_image(folder, client):
    """Of a photo that is twice as wide as high, which the file's metadata letterboxes: 16 pixels of gray each side."""
    photo = photos(64, 128)[2]
    result = client.explain(photo, model="yolo", min_score=0, map_size="source")
    path = folder / "yolo.onnx"
    loaded = load_file(path, ModelConfig(name="yolo", source=f"onnx:{path}"))
    pixels = fit(photo, loaded.info.preprocess).pixels
    assert (pixels[:16] == pixels[0, 0]).all()
    spec = MapSpec(Method.HI_RES_CAM, (loaded.info.layers[0].name,), upsample=True)
    (expected,) = NetworkEngine(loaded, device="cpu").explain(pixels[None], [Detections(0.0, 32)], spec)
    assert len(result.explanations) == len(expected.findings) > 2
    for mine, theirs in zip(result.explanations, expected.findings, strict=True):
        assert (mine.label, mine.probability) == (NAMES[theirs.class_id], pytest.approx(theirs.probability))
        left, top, right, bottom = theirs.box
        box = (mine.box.left, mine.box.top, mine.box.right, mine.box.bottom)
        assert box == pytest.approx((2 * left, 2 * top - 32, 2 * right, 2 * bottom - 32), abs=1e-3)
        assert mine.heatmap.values.shape == (64, 128)
    (best,) = client.explain(photo, model="yolo", min_score=0, top_k=1, class_ids=None).explanations
    assert best.box == result.explanations[0].box
    named = client.explain(photo, model="yolo", min_score=0, class_ids=["dog"]).explanations
    assert {item.label for item in named} == {"dog"}


def test_a_detector_that_finds_nothing_explains_nothing(client):
    assert client.explain(photos(64, 128)[2], model="yolo", min_score=1.0).explanations == ()


def test_boxes_of_queries(client):
    photo = photos(64, 128)[0]
    found = client.explain(photo, model="detr", min_score=0, top_k=3, method="layer-cam", target_score="probability")
    assert len(found.explanations) == 3
    for item in found.explanations:
        assert 0 <= item.class_id < box_networks.CLASSES
        assert item.heatmap.values.max() == 1.0
        assert 0 <= item.box.left < item.box.right <= 128
    with pytest.raises(InvalidArgumentError, match="target_score"):
        client.explain(photo, model="detr", target_score="contrast")


def test_what_was_assumed_is_told(server, client):
    models = {model.name: model for model in client.models()}
    assert [models[name].task for name in ("one", "three")] == ["segmentation"] * 2
    assert [models[name].task for name in ("yolo", "detr")] == ["detection"] * 2
    assert 'detector = "yolov8"' in " ".join(models["yolo"].assumptions)
    assert models["yolo"].class_count == models["detr"].class_count == box_networks.CLASSES
    assert models["yolo"].layers[0].startswith("/module/neck/up.1")
    assert "taken as those of pixels" in " ".join(models["one"].assumptions)
    assert "exclude each other" in " ".join(models["three"].assumptions)
    assert "cam" not in models["one"].methods
    assert [models[name].default_method for name in ("one", "yolo")] == ["grad-cam", "hi-res-cam"]
    assert "the score of a box depends on few places" in " ".join(models["yolo"].assumptions)
    assert not server.has_torch()
