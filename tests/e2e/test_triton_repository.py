"""`heatlens-server export --triton`: Triton's own proto reads the configuration, and what it says runs the graph."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
from torch import nn

import tiny_models
from heatlens import Client
from heatlens_server.backends.onnx.manifest import read_manifest
from heatlens_server.backends.onnx.triton import version_folder, write_config
from heatlens_server.core.errors import ConfigError, ExportError
from heatlens_server.export_command import find_model, parse_options, run_export
from onnx_files import write_onnx
from server_process import wait_settled
from server_toml import server_toml

PYTHON = Path(__file__).parents[2] / ".venv-triton" / "bin" / "python"
READ = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
with open(sys.argv[1]) as file:
    print(json_format.MessageToJson(text_format.Parse(file.read(), model_config_pb2.ModelConfig())))
"""
TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_INT64": "tensor(int64)", "TYPE_UINT8": "tensor(uint8)"}
DTYPES = {"TYPE_FP32": np.float32, "TYPE_INT64": np.int64, "TYPE_UINT8": np.uint8}
SIZE = "preprocess = { resize_px = 64, crop_px = 64 }"
LABELS = ["cat", "dog", "a label\nof two lines", "dog", "büro", "", 'a "quoted" one']
OPTIONS = {
    "file_format": "onnx", "layer": "", "method": "", "classes": "1", "precision": "fp32", "outputs": "all",
    "input_kind": "float", "verify": False,
}  # fmt: skip


def read_config(version: Path) -> dict:
    """The configuration as Triton's proto reads it."""
    assert PYTHON.exists(), "make .venv-triton/.ready installs the environment"
    command = [PYTHON, "-c", READ, version.parent / "config.pbtxt"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def export(path: Path, repository: Path, **changes) -> tuple[Path, dict]:
    """Export an ONNX file; the version's folder, and the configuration."""
    model = find_model(f"onnx:{path}", None, "")
    options = parse_options(**{**OPTIONS, "triton": repository, **changes})
    run_export(model, options, tell=lambda _line: None)
    return options.folder_of(model.name), read_config(options.folder_of(model.name))


def run_as_configured(version: Path, config: dict, feeds: dict) -> dict:
    """Run the graph as Triton's onnxruntime backend does: it looks for what the configuration names."""
    session = onnxruntime.InferenceSession(version / config["defaultModelFilename"], providers=["CPUExecutionProvider"])
    batch = ["batch"] * (int(config.get("maxBatchSize", 0)) > 0)
    for key, found in (("input", session.get_inputs()), ("output", session.get_outputs())):
        by_name = {tensor.name: tensor for tensor in found}
        assert set(by_name) == {tensor["name"] for tensor in config[key]}
        for tensor in config[key]:
            lengths = [-1 if isinstance(n, str) else n for n in by_name[tensor["name"]].shape[len(batch) :]]
            assert (lengths, by_name[tensor["name"]].type) == (
                [int(n) for n in tensor["dims"]],
                TYPES[tensor["dataType"]],
            )
    names = [tensor["name"] for tensor in config["output"]]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    tiny_models.make_all()
    return write_onnx(tiny_models.tiny(), tmp_path_factory.mktemp("network") / "tiny.onnx")


@pytest.fixture(scope="module")
def class_count(network) -> int:
    return onnxruntime.InferenceSession(network).get_outputs()[0].shape[1]


def test_a_repository_says_what_a_server_says(tmp_path, network, class_count, launch, chelsea):
    """Of the real command: the graph in it, run as its configuration says, answers as a server of the same file."""
    labels = [*LABELS, *map(str, range(class_count))][:class_count]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    keys = f'name = "tiny"\nsource = "onnx:{network}"\nlabels = "{tmp_path / "labels.json"}"'
    toml = server_toml(
        f'[[models]]\n{keys}\ndevice = "cpu"\ninstances = 2\nbatching = {{ max_batch_size = 6 }}\n{SIZE}'
    )
    (tmp_path / "server.toml").write_text(toml)
    command = [sys.executable, "-m", "heatlens_server", "export", "tiny", "-c", tmp_path / "server.toml"]
    repository = tmp_path / "deep" / "repository"
    done = subprocess.run([*command, "--triton", repository], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    version = repository / "tiny" / "1"
    assert str(version / "tiny.onnx") in done.stdout
    assert str(repository / "tiny" / "config.pbtxt") in done.stdout
    assert [path.name for path in repository.iterdir()] == ["tiny"]

    config = read_config(version)
    assert (config["name"], config["backend"], config["maxBatchSize"]) == ("tiny", "onnxruntime", 6)
    assert config["instanceGroup"] == [{"count": 2, "kind": "KIND_CPU"}]
    assert config["dynamicBatching"] == {"defaultQueuePolicy": {"maxQueueSize": 256}}
    (logits,) = (tensor for tensor in config["output"] if "labelFilename" in tensor)
    assert logits["name"] == "logits"
    lines = (version.parent / logits["labelFilename"]).read_text().split("\n")
    assert lines == [*(" ".join(label.split()) for label in labels), ""], "a line for each class"
    for warm_up in config["modelWarmup"]:
        feeds = {
            name: np.zeros([warm_up["batchSize"], *map(int, given["dims"])], DTYPES[given["dataType"]])
            for name, given in warm_up["inputs"].items()
        }
        found = run_as_configured(version, config, feeds)
        assert found["cam"].shape[0] == warm_up["batchSize"]
    assert [warm_up["batchSize"] for warm_up in config["modelWarmup"]] == [1, 6]

    server = launch(toml)
    wait_settled(server.address)
    manifest = read_manifest(version)
    height_px, width_px = manifest.preprocess.crop_px
    # Of the input's size, there is nothing to resize.
    image = cv2.resize(chelsea, (width_px, height_px), interpolation=cv2.INTER_AREA)
    values = (image / 255 * manifest.preprocess.scale - manifest.preprocess.mean) / manifest.preprocess.std
    batch = np.stack([values, values[::-1]]).transpose(0, 3, 1, 2).astype(np.float32)
    found = run_as_configured(version, config, {"image": batch, "class_index": np.full((2, 1), -1)})
    with Client(server.address) as client:
        for n, pixels in enumerate((image, np.ascontiguousarray(image[::-1]))):
            (expected,) = client.explain(pixels).explanations
            assert found["class_id"][n, 0] == expected.class_id
            assert found["logits"][n, expected.class_id] == pytest.approx(expected.logit, abs=1e-4)
            np.testing.assert_allclose(found["cam"][n, 0], expected.heatmap.values, atol=1e-4)
            assert not expected.heatmap.is_flat


def test_shapes_and_types_are_those_of_the_graph(tmp_path, network):
    version, config = export(network, tmp_path, classes="any", input_kind="uint8", outputs="cam,logits")
    assert not (version.parent / "labels.txt").exists()
    assert not any("labelFilename" in tensor for tensor in config["output"])
    assert config["instanceGroup"] == [{"count": 1}], "KIND_AUTO is the first"
    feeds = {"image": np.zeros((3, 3, 64, 64), np.uint8), "class_index": np.tile([0, -1], (3, 1))}
    assert run_as_configured(version, config, feeds)["cam"].shape[:2] == (3, 2)
    (image, class_index) = config["input"]
    assert (image["dataType"], image["dims"], class_index["dims"]) == ("TYPE_UINT8", ["3", "64", "64"], ["-1"])
    assert config["modelWarmup"][0]["inputs"]["class_index"]["dims"] == ["1"]


class Mixing(nn.Module):
    """Takes the mean image off."""

    def __init__(self):
        super().__init__()
        self.body = tiny_models.tiny()

    def forward(self, x):
        return self.body(x - x.mean(0, keepdim=True) * 0.5)


def test_a_graph_of_one_image_is_not_batched(tmp_path):
    version, config = export(write_onnx(Mixing(), tmp_path / "mixing.onnx"), tmp_path / "repository")
    assert "maxBatchSize" not in config, "it is 0: shapes are whole"
    assert "dynamicBatching" not in config
    (warm_up,) = config["modelWarmup"]
    assert (warm_up["batchSize"], warm_up["inputs"]["image"]["dims"]) == (1, ["1", "3", "64", "64"])
    feeds = {"image": np.zeros((1, 3, 64, 64), np.float32), "class_index": np.array([[-1]])}
    assert run_as_configured(version, config, feeds)["cam"].shape[:2] == (1, 1)


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (("cuda",), [{"count": 1, "kind": "KIND_GPU"}]),
        (("cuda:0", "cuda:12"), [{"count": 1, "kind": "KIND_GPU", "gpus": [gpu]} for gpu in (0, 12)]),
    ],
)
def test_gpus(tmp_path, network, devices, expected):
    version, _config = export(network, tmp_path)
    write_config(version, read_manifest(version), max_batch_size=1, devices=devices)
    config = read_config(version)
    assert config["instanceGroup"] == expected
    assert len(config["modelWarmup"]) == 1


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path, network):
    version, _config = export(network, tmp_path)
    (version.parent / "labels.txt").write_text("stale\n")
    again, config = export(network, tmp_path, outputs="cam")
    assert (again, [tensor["name"] for tensor in config["output"]]) == (version, ["cam"])
    assert not (version.parent / "labels.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.pbtxt").write_text('name: "mine"')
    with pytest.raises(ExportError, match="mine holds a model that heatlens did not write: choose another repository"):
        version_folder(tmp_path, "mine")
    (tmp_path / "tiny" / "1" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--triton: .*choose another folder"):
        export(network, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"triton": None}, "--output: give it or --triton, one of the two"),
        ({"folder": Path("out")}, "--output: give it or --triton, one of the two"),
        ({"file_format": "pt2"}, "--format: what Triton's onnxruntime backend runs is onnx, not 'pt2'"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ConfigError) as caught:
        parse_options(**{**OPTIONS, "triton": Path("repository"), **changes})
    assert str(caught.value) == message
