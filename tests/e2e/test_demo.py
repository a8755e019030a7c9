"""`make demo` and `make demo-video` as a user runs them: what they say and write; and that the map lies on the cat."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from heatlens import Client

ROOT = Path(__file__).parents[2]
INSTALLED_S = 20.0
CATS = {281: "tabby", 282: "tiger cat", 285: "Egyptian cat"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The finished demo and the folder it ran in."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, ROOT / "examples" / "demo.py", "--since", str(time.time() - INSTALLED_S)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return done, folder


def test_demo_says_cat_with_its_probability(demo):
    done, _ = demo
    rows = re.findall(r"(\d+) │ (.+?) +│ +([\d.]+)%", done.stdout)
    assert len(rows) == 3, done.stdout
    assert {int(class_id): label for class_id, label, _ in rows} == CATS
    percentages = [float(percentage) for *_, percentage in rows]
    assert percentages == sorted(percentages, reverse=True)
    assert 20 < percentages[0] < 80


def test_demo_writes_what_it_says(demo):
    done, folder = demo
    overlay, pair = (folder / line.removeprefix("wrote ") for line in done.stdout.splitlines()[-2:])
    assert re.fullmatch(r"chelsea-(tabby|tiger-cat|egyptian-cat)\.png", overlay.name)
    assert overlay.parent == pair.parent == folder / "out" / "demo"
    assert cv2.imread(str(overlay)).shape == (288, 433, 3)
    assert cv2.imread(str(pair)).shape == (288, 866, 3)


def test_demo_says_how_long_it_took(demo):
    done, _ = demo
    (said,) = re.findall(r"^([\d.]+) s: ([\d.]+) to install, ([\d.]+) to start the server, ([\d.]+) to explain$",
                         done.stdout, re.MULTILINE)  # fmt: skip
    whole, *parts = map(float, said)
    assert whole == pytest.approx(sum(parts), abs=0.2)
    assert parts[0] == pytest.approx(INSTALLED_S, abs=1)
    assert parts[1] > 0
    # An explanation may take less than the tenth of a second that is told.
    assert parts[2] >= 0


def test_demo_leaves_no_server_behind(demo):
    done, _ = demo
    assert "stopped" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_the_map_lies_on_the_cat(server, chelsea):
    with Client(server.address) as client:
        result = client.explain(chelsea, model="efficientnet_lite0")
    (top,) = result.explanations
    assert top.class_id in CATS
    heat = top.heatmap.on(chelsea)
    face = np.zeros(heat.shape, bool)
    face[20:220, 100:330] = True
    assert heat[face].mean() > 2 * heat[~face].mean()
    # Outside of what the model saw the map is zero anyway: the face must win inside of it too.
    region = result.source_region
    seen = np.zeros(heat.shape, bool)
    seen[round(region.top) : round(region.bottom), round(region.left) : round(region.right)] = True
    assert heat[face & seen].mean() > 1.2 * heat[~face & seen].mean()
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert face[row, column]


def test_the_picture_of_the_readme_is_the_demos(demo):
    committed = cv2.imread(str(ROOT / "docs" / "images" / "chelsea.jpg")).astype(float)
    made = cv2.imread(str(demo[1] / "out" / "demo" / "chelsea.jpg")).astype(float)
    # Another torch may round differently, and another JPEG encoder too; a stale picture differs by far more.
    assert np.abs(committed - made).mean() < 2


@pytest.fixture(scope="module")
def demo_video(tmp_path_factory):
    """What the finished demo of a film said, and the folder with what it wrote."""
    folder = tmp_path_factory.mktemp("demo-video")
    command = [sys.executable, ROOT / "examples" / "demo_video.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, folder / "out" / "demo-video"


def test_demo_video_writes_a_playable_film_of_every_frame(demo_video):
    said, folder = demo_video
    assert "132 explained, wrote out/demo-video/overlay.mp4 (H.264)" in said
    capture = cv2.VideoCapture(str(folder / "overlay.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == 25
    shapes = []
    while (found := capture.read())[0]:
        shapes.append(found[1].shape)
    assert shapes == [(720, 1280, 3)] * 132
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["frame_id"] for line in lines] == list(range(132))
    assert {line["status"] for line in lines} == {"explained"}


def test_demo_video_flickers_less_when_smoothed(demo_video):
    plain, smoothed = map(float, re.search(r"maps: ([\d.]+) plain, ([\d.]+) smoothed", demo_video[0]).groups())
    assert 0.01 < smoothed < 0.9 * plain < 0.1


def test_demo_video_writes_pictures_to_look_at(demo_video):
    _, folder = demo_video
    assert cv2.imread(str(folder / "contact-sheet.png")).shape == (900, 1600, 3)
    made, committed = (
        cv2.imread(str(path)) for path in (folder / "stream.png", ROOT / "docs" / "images" / "stream.png")
    )
    assert made.shape == (360, 1280, 3)
    # The grain of the palette is chance.
    made, committed = (
        cv2.resize(image, (160, 45), interpolation=cv2.INTER_AREA).astype(float) for image in (made, committed)
    )
    assert np.abs(made - committed).mean() < 4
    assert (ROOT / "docs" / "images" / "stream.png").stat().st_size < 300_000
