"""The standalone examples, where heatlens cannot be imported: the command exports, they explain."""

import json
import os
import shlex
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from heatlens_server.export_command import find_model, parse_options, run_export

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).parent / "heatlens-server"
CATS = ("tiger cat", "Egyptian cat")
PHOTO = ROOT / "server" / "heatlens_server" / "backends" / "torch" / "export" / "photos" / "chelsea.jpg"

# Nothing but these, and what they need themselves.
ONNX = ("onnxruntime", "numpy", "cv2", "flatbuffers", "google", "packaging")
TORCH = (
    "torch",
    "torchgen",
    "functorch",
    "numpy",
    "cv2",
    "typing_extensions",
    "filelock",
    "sympy",
    "mpmath",
    "networkx",
)
TORCH += ("jinja2", "markupsafe", "fsspec", "nvidia", "cuda", "triton")


def place(packages, folder):
    """Links to the packages alone, in a folder to import from."""
    folder.mkdir()
    for package in packages:
        spec = find_spec(package)
        if spec is None:
            continue
        locations = spec.submodule_search_locations
        target = Path(next(iter(locations))) if locations else Path(spec.origin)
        (folder / target.name).symlink_to(target)
        # Shared libraries that wheels put beside the package.
        for beside in target.parent.glob(f"{_libraries_of(package)}.libs"):
            (folder / beside.name).symlink_to(beside)
    return folder


def _libraries_of(package):
    return {"cv2": "opencv_python_headless"}.get(package, package)


# The README's two lines, as they stand, and the same for TorchScript.
README = [
    shlex.split(line)
    for line in (ROOT / "README.md").read_text().splitlines()
    if line.endswith(" exported") or " exported cat.jpg " in line
]
TORCHSCRIPT = [
    ["heatlens-server", "export", "efficientnet_lite0", "--format", "torchscript", "--no-verify", "-o", "exported"],
    ["python", "examples/torchscript_cam.py", "exported", "cat.jpg", "cat-why.png"],
]


def run_alone(folder, *arguments, cwd=None):
    """Run Python with what is in a folder, and nothing else that is installed."""
    program = (
        # Not first: OpenCV puts its own folder second.
        "import sys, runpy; from importlib.util import find_spec\n"
        "sys.path.append(sys.argv[1]); sys.argv = sys.argv[2:]\n"
        "for name in ('heatlens', 'heatlens_server', 'pydantic', 'skimage'):\n"
        "    if find_spec(name): raise SystemExit(f'{name} can be imported')\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, folder, *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=cwd or folder,
    )


@pytest.mark.parametrize(("lines", "packages"), [(README, ONNX), (TORCHSCRIPT, TORCH)], ids=["README", "torchscript"])
def test_an_exported_model_explains_without_heatlens(tmp_path, lines, packages):
    (command, *export), (python, *explain) = lines
    assert (command, python) == (COMMAND.name, "python")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HEATLENS_")}
    done = subprocess.run(
        [COMMAND, *export], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "cat.jpg").symlink_to(PHOTO)
    done = run_alone(place(packages, tmp_path / "packages"), *explain, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    label, _, probability = done.stdout.strip().rpartition(" ")
    assert label in CATS
    assert 30 < float(probability.removesuffix("%")) < 40
    overlay = cv2.imread(str(tmp_path / "cat-why.png"))
    assert overlay.shape == (224, 224, 3)
    heat = saliency_of(overlay, PHOTO)
    # The cat's eyes, nose and cheek; above are its ears, below its neck.
    face = np.zeros((224, 224), bool)
    face[50:190, 15:205] = True
    hot = heat > 0.75
    assert hot.mean() > 0.03
    assert (hot & face).sum() > 0.9 * hot.sum()


def saliency_of(overlay, photo_path):
    """Read the map back from its colours: TURBO runs from blue through green to red."""
    photo = cv2.imread(str(photo_path))
    scale = 256 / min(photo.shape[:2])
    resized = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (resized.shape[0] - 224) // 2, (resized.shape[1] - 224) // 2
    crop = resized[top : top + 224, left : left + 224].astype(np.float32)
    colours = 2 * overlay.astype(np.float32) - crop
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[:, 0].astype(np.float32)
    small = cv2.resize(colours, (224, 224))
    return np.abs(small[:, :, None, :] - table[None, None, ::8]).sum(-1).argmin(-1) * 8 / 255


@pytest.mark.parametrize("package", ["heatlens", "heatlens_server"])
def test_heatlens_would_be_found(tmp_path, package):
    """The test above can fail."""
    (tmp_path / "empty.py").write_text("")
    done = run_alone(place([package], tmp_path / "packages"), tmp_path / "empty.py")
    assert (done.returncode, done.stderr) == (1, f"{package} can be imported\n")


class Network(nn.Module):
    """A network of one kind of input and of scores."""

    def __init__(self, channels, classes, *, takes_bytes=False, ends_in_sigmoid=False):
        super().__init__()
        self.takes_bytes, self.ends_in_sigmoid = takes_bytes, ends_in_sigmoid
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.body = nn.Sequential(nn.Conv2d(channels, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 8, 5, 2), nn.ReLU())
            self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = x.float() / 127.5 - 1.0 if self.takes_bytes else x
        scores = 3 * self.head(self.body(x).mean((2, 3)))
        return scores.sigmoid() if self.ends_in_sigmoid else scores


@pytest.mark.parametrize("input_kind", ["float", "uint8"])
@pytest.mark.parametrize(
    ("channels", "classes", "options"),
    [
        (3, 6, {"takes_bytes": True}),
        (1, 6, {}),
        (3, 1, {"ends_in_sigmoid": True}),
        (4, 6, {"ends_in_sigmoid": True}),
    ],
    ids=["bytes", "gray", "binary", "multi-label of RGBA"],
)
def test_the_example_reads_what_the_manifest_says(tmp_path, channels, classes, options, input_kind):
    """What it says of an ONNX file's export is what the file itself says."""
    network = Network(channels, classes, **options)
    shape = torch.zeros(1, channels, 64, 64, dtype=torch.uint8 if network.takes_bytes else torch.float32)
    path = tmp_path / "m.onnx"
    axes = {"image": {0: "batch"}, "scores": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (shape,),
            path,
            dynamo=False,
            input_names=["image"],
            output_names=["scores"],
            dynamic_axes=axes,
            opset_version=17,
        )
    chosen = parse_options(
        file_format="onnx",
        layer="",
        method="",
        classes="1",
        precision="fp32",
        outputs="all",
        input_kind=input_kind,
        verify=False,
        folder=tmp_path / "out",
    )
    run_export(find_model(f"onnx:{path}", None, ""), chosen, tell=lambda _line: None)
    command = [sys.executable, ROOT / "examples" / "onnx_cam.py", tmp_path / "out", PHOTO, tmp_path / "why.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    winner, probability = done.stdout.split()

    spec = json.loads((tmp_path / "out" / "manifest.json").read_text())["preprocess"]
    photo = cv2.imread(str(PHOTO))
    scale = spec["resize_px"] / min(photo.shape[:2])
    size = (round(photo.shape[1] * scale), round(photo.shape[0] * scale))
    resized = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
    top, left = (resized.shape[0] - 64) // 2, (resized.shape[1] - 64) // 2
    crop = resized[top : top + 64, left : left + 64]
    gray = cv2.cvtColor(crop, cv2.COLOR_BGR2GRAY)[..., None]
    opaque = np.full((64, 64, 1), 255, np.uint8)
    pixels = gray if channels == 1 else np.concatenate([crop[..., ::-1], opaque], axis=-1)[..., :channels]
    given = pixels if network.takes_bytes else ((pixels / 255 - spec["mean"]) / spec["std"]).astype(np.float32)
    image = np.ascontiguousarray(given.transpose(2, 0, 1)[None])
    (scores,) = onnxruntime.InferenceSession(path).run(None, {"image": image})
    if classes == 1:
        expected = np.array([1 - scores[0, 0], scores[0, 0]])
    else:
        expected = scores[0] if network.ends_in_sigmoid else np.exp(scores[0]) / np.exp(scores[0]).sum()
    assert int(winner) == expected.argmax()
    assert float(probability.removesuffix("%")) == pytest.approx(100 * expected.max(), abs=0.11)


def test_examples_are_short():
    for example in ("onnx_cam.py", "torchscript_cam.py"):
        assert len((ROOT / "examples" / example).read_text().splitlines()) <= 46
