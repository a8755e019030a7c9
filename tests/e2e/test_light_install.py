"""A server in an environment that holds `heatlens[server]` and nothing else, asked from this one, which has torch."""

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from cli_process import start_cli
from heatlens import Client, InvalidArgumentError
from heatlens_server.backends.torch.sources.load import load_model
from heatlens_server.config import ModelConfig
from heatlens_server.core.methods import CLOSED_FORMS, Method
from heatlens_server.imaging.preprocess import fit
from loaded_models import Judge
from server_process import start_server_process, wait_settled
from video_files import lines_of, write_video

PYTHON = Path(__file__).parents[2] / ".venv-light" / "bin" / "python"
HEAVY = ("torch", "torchvision", "timm", "safetensors", "onnx", "onnx_ir", "onnxscript")
SOURCE = "embedded:efficientnet_lite0"

MOST_BYTES = 450_000_000
# 195 MB and 1.2 s on a quiet machine; beside other processes, a core takes twice as long.
MOST_RESIDENT_BYTES = 230_000_000
MOST_CPU_S = 3.0


@pytest.fixture(scope="module", autouse=True)
def installed():
    assert PYTHON.exists(), "make .venv-light/.ready installs the environment"


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """The server, with its default model alone."""
    running = start_server_process(
        tmp_path_factory.mktemp("light"), '[server]\nlisten = "127.0.0.1:0"\n', python=PYTHON
    )
    wait_settled(running.address)
    yield running
    running.process.terminate()
    assert running.process.wait(30) == 0, running.log()


@pytest.fixture(scope="module")
def client(light):
    with Client(light.address) as client:
        yield client


@pytest.fixture(scope="module")
def model():
    return load_model(ModelConfig(name="m", source=SOURCE))


@pytest.fixture(scope="module")
def judge(model):
    return Judge(model.module, model.preprocess)


@pytest.fixture(scope="module")
def seen(model, chelsea):
    """What the model sees of the photo: uint8 (224, 224, 3)."""
    return fit(chelsea, model.preprocess).pixels


def run_light(*arguments: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [PYTHON, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )


def test_nothing_heavy_is_installed():
    program = f"import importlib.util; print([name for name in {HEAVY!r} if importlib.util.find_spec(name)])"
    assert run_light("-c", program).stdout.strip() == "[]"
    assert run_light("-c", "import torch").returncode == 1
    packages = PYTHON.parents[1]
    assert sum(path.lstat().st_size for path in packages.rglob("*") if not path.is_dir()) < MOST_BYTES


def test_the_model_says_what_is_missing(client, model):
    (served,) = client.models()
    assert served.engine == "onnxruntime"
    assert (served.version, served.layers) == (model.version, model.layers)
    assert {*CLOSED_FORMS, Method.FINER_CAM, Method.REFINE_CAM} <= set(served.methods)
    assert Method.FULL_GRAD not in served.methods
    (said,) = served.assumptions
    assert said.startswith("PyTorch is not installed, so that ")
    assert Method.FULL_GRAD in said
    assert "pip install 'heatlens[torch]'" in said


@pytest.mark.parametrize("method", CLOSED_FORMS)
def test_every_closed_form_is_right(client, judge, seen, chelsea, method):
    # Each class has random weights of its own, and the judge knows one class at a time.
    count = 1 if method is Method.RANDOM_CAM else 3
    result = client.explain(chelsea, method=method, top_k=count)
    found = [item.class_id for item in result.explanations]
    logits = judge.logits(seen)
    assert found == np.argsort(-logits)[:count].tolist()
    np.testing.assert_allclose([item.logit for item in result.explanations], logits[found], atol=2e-5)
    # CAM's weights of channels are the sums of the gradients whose means Grad-CAM's are.
    formula = Method.GRAD_CAM if method is Method.CAM else method
    expected, _ = judge.maps(seen, found, formula, ["bn2"], upsample=False)
    assert expected.max() == 1
    for item, map_ in zip(result.explanations, expected, strict=True):
        np.testing.assert_allclose(item.heatmap.values, map_, atol=1e-5)


@pytest.mark.parametrize("layer", ["blocks.4", "blocks.2"])
def test_inner_layers_are_right(client, judge, seen, chelsea, layer):
    (item,) = client.explain(chelsea, method="layer-cam", layers=[layer]).explanations
    expected, _ = judge.maps(seen, [item.class_id], Method.LAYER_CAM, [layer], upsample=False)
    np.testing.assert_allclose(item.heatmap.values, expected[0], atol=1e-4)


def test_methods_of_many_runs_and_measures_need_no_torch(client, chelsea):
    (measured,) = client.explain(chelsea, faithfulness="deletion").explanations
    assert 0 < measured.faithfulness.deletion < 1
    # Both find the cat's face.
    (other,) = client.explain(chelsea, method="recipro-cam").explanations
    assert np.corrcoef(measured.heatmap.values.ravel(), other.heatmap.values.ravel())[0, 1] > 0.5


def test_a_stream_gives_what_single_calls_give(client, chelsea):
    frames = [np.ascontiguousarray(np.roll(chelsea, 20 * shift, axis=1)) for shift in range(6)]
    with client.stream() as stream:
        items = list(stream.map(frames))
    assert [item.error for item in items] == [None] * 6
    for frame, item in zip(frames, items, strict=True):
        (streamed,) = item.result.explanations
        (single,) = client.explain(frame).explanations
        assert streamed.class_id == single.class_id
        np.testing.assert_allclose(streamed.heatmap.values, single.heatmap.values, atol=1e-5)


def test_a_film_is_explained(light, chelsea, tmp_path):
    clip = write_video(tmp_path / "cat.mp4", [np.roll(chelsea[:, :450], 9 * shift, axis=1) for shift in range(8)])
    process = start_cli(
        "video", clip, "-o", tmp_path / "why.mp4", "--json", tmp_path / "why.jsonl", "--server", light.address
    )
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    answers = lines_of((tmp_path / "why.jsonl").read_text())
    assert [answer["status"] for answer in answers] == ["explained"] * 8
    assert {answer["explanations"][0]["label"] for answer in answers} <= {"tabby", "tiger cat", "Egyptian cat"}


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        (b"garbage", {}, "IMAGE_UNDECODABLE"),
        (None, {"method": "full-grad"}, "does not support full-grad: the server has no PyTorch; it supports: cam"),
        (None, {"layers": ["blocks.3"]}, "blocks.3"),
        (None, {"class_ids": [1000]}, "class_ids"),
    ],
)
def test_what_cannot_be_done_is_told(client, chelsea, image, options, message):
    with pytest.raises(InvalidArgumentError) as caught:
        client.explain(chelsea if image is None else image, **options)
    assert message in f"{caught.value} {caught.value.reason} {caught.value.field_violations}"
    assert client.explain(chelsea).explanations[0].probability > 0.3


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [("torchvision:resnet18", "torch", "torch"), (f'{SOURCE}"\nengine = "torch', "torch", "torch")],
)
def test_what_is_not_installed_is_named(tmp_path, source, package, extra):
    (tmp_path / "server.toml").write_text(
        f'[server]\ncache_dir = "cache"\n[[models]]\nname = "m"\nsource = "{source}"\n'
    )
    done = run_light("-m", "heatlens_server", "check", "--config", "server.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert f"this needs {package}, which is not installed: pip install 'heatlens[{extra}]'" in done.stderr


@pytest.mark.serial
def test_the_first_map_takes_little_time_and_memory(tmp_path, launch, chelsea):
    running = launch('[server]\nlisten = "127.0.0.1:0"\n', python=PYTHON)
    while "ready: onnxruntime" not in running.log():
        time.sleep(0.05)
    with Client(running.address) as client:
        assert client.explain(chelsea).explanations
    process = psutil.Process(running.process.pid)
    times = process.cpu_times()
    assert times.user + times.system < MOST_CPU_S
    assert process.memory_info().rss < MOST_RESIDENT_BYTES
