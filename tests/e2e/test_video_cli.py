"""The real `heatlens video` against a real server: films, lines of JSON, messages and exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from heatlens._cli import app
from heatlens._video.quiet import silence
from server_process import wait_settled

# The tests open videos themselves.
silence()

COMMAND = Path(sys.executable).parent / "heatlens"
# A process that was started in the background by some shells ignores SIGINT, and so do its children.
PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from heatlens._cli import app
app()
"""
NOBODY = "127.0.0.1:1"
SIZE = (65, 49)
FPS = 12.5
FRAMES = 20
QUICKLY_S = 60

ONE_MODEL = """
[server]
listen = "127.0.0.1:0"
log_format = "json"

[[models]]
name = "{name}"
source = "python:tiny_models:{name}"
layers = ["body"]
engine = "torch"

[models.preprocess]
resize_px = 64
crop_px = 64
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
interpolation = "bilinear"
"""


def picture(index, size=SIZE):
    """A square that moves over a dark ground."""
    pixels = np.full((size[1], size[0], 3), 40, np.uint8)
    left = 2 * index % (size[0] - 16)
    pixels[20:36, left : left + 16] = (60, 200, 120)
    return pixels


def write_clip(path, frames=FRAMES, size=SIZE):
    # PNG in MOV: exact, and OpenCV's own writer cuts odd sizes.
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=Fraction(FPS))
        stream.width, stream.height = size
        stream.pix_fmt = "rgb24"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(index, size), format="bgr24")
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = write_clip(tmp_path_factory.mktemp("clip") / "clip.mov")
    assert read(path)[1][0].shape == (SIZE[1], SIZE[0], 3)
    return path


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Longer than any test watches it."""
    return write_clip(tmp_path_factory.mktemp("clip") / "long.mov", frames=3000)


@pytest.fixture
def run(monkeypatch):
    """Run the command in this process; stdout and stderr apart."""
    for name in ("HEATLENS_ADDRESS", "HEATLENS_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments, exit_code=0):
        done = CliRunner().invoke(app, ["video", *(str(argument) for argument in arguments)])
        assert done.exit_code == exit_code, done.output
        return done

    return run


@pytest.fixture
def run_on(run, server):
    return lambda *arguments, **options: run(*arguments, "--server", server.address, **options)


@pytest.fixture
def start():
    """Start the command in a process of its own."""
    running = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HEATLENS_", "OPENCV_"))}

    def start(*arguments):
        command = [sys.executable, "-c", PROGRAM, "video", *(str(argument) for argument in arguments)]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        )
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def read(path):
    """A film's frames per second and frames."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (found := capture.read())[0]:
        frames.append(found[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def one_line(text):
    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text.strip()


def statuses(path):
    return [line["status"] for line in lines_of(path.read_text())]


def test_a_film_and_its_lines_in_silence(start, server, clip, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    process = start(clip, "-o", film, "--json", lines, "--server", server.address, "--smooth", 0.5)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 0, stderr
    assert stderr == ""
    assert stdout.startswith(f"{FRAMES} frames in ")
    assert f"{FRAMES} explained, wrote {film} (H.264)" in one_line(stdout)
    fps, frames = read(film)
    assert fps == pytest.approx(FPS)
    # An odd side gets a pixel more.
    assert [frame.shape for frame in frames] == [(50, 66, 3)] * FRAMES
    answers = lines_of(lines.read_text())
    assert [answer["frame_id"] for answer in answers] == list(range(FRAMES))
    assert [answer["time_s"] for answer in answers] == pytest.approx([index / FPS for index in range(FRAMES)])
    for answer in answers:
        assert answer["status"] == "explained"
        assert answer["error"] is None
        assert answer["latency_ms"] > 0
        assert answer["timing"]["batch_size"] >= 1
        (only,) = answer["classes"]
        assert 0 <= only["id"] < 10
        assert 0 < only["probability"] <= 1


def test_every_frame_of_the_film_is_the_frame_of_the_clip(run_on, clip, tmp_path):
    run_on(clip, "-o", tmp_path / "film.mp4", "--alpha", 0)
    _, originals = read(clip)
    _, frames = read(tmp_path / "film.mp4")
    for original, frame in zip(originals, frames, strict=True):
        # Below the banner; the square moves by two pixels a frame.
        np.testing.assert_allclose(frame[20:49, :65].astype(float), original[20:], atol=60)
        assert np.abs(frame[20:49, :65].astype(float) - original[20:]).mean() < 6


def test_every(run_on, clip, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    done = run_on(clip, "-o", film, "--json", lines, "--every", 3)
    assert statuses(lines) == ["explained" if index % 3 == 0 else "skipped" for index in range(FRAMES)]
    assert len(read(film)[1]) == FRAMES
    assert "7 explained, 13 skipped" in done.stdout


def test_max_fps_counts_film_and_not_time(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run_on(clip, "--json", lines, "--max-fps", FPS / 2)
    assert statuses(lines) == ["explained", "skipped"] * (FRAMES // 2)


def test_options_reach_the_server(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    what = ["--model", "tiny_mlp", "--method", "grad-cam", "--layer", "body", "--class", 3, "--class", 1]
    run_on(clip, "--json", lines, *what, "--max-frames", 3, "--max-in-flight", 1)
    answers = lines_of(lines.read_text())
    assert [[item["id"] for item in answer["classes"]] for answer in answers] == [[3, 1]] * 3
    run_on(clip, "--json", lines, "--top-k", 4, "--max-frames", 3)
    assert [len(answer["classes"]) for answer in lines_of(lines.read_text())] == [4] * 3


def test_raw_pixels_are_exact(run_on, tmp_path, chelsea_path, chelsea):
    lines = tmp_path / "lines.jsonl"
    found = []
    for how in (["--raw"], ["--quality", 100], ["--quality", 5]):
        run_on(chelsea_path, "--json", lines, "--model", "tiny_mlp", *how)
        found.append(lines_of(lines.read_text())[0]["classes"][0]["probability"])
    raw, fine, coarse = found
    assert abs(fine - raw) < abs(coarse - raw)


def test_limits(run_on, clip, tmp_path):
    lines = tmp_path / "lines.jsonl"
    run_on(clip, "--json", lines, "--max-frames", 7)
    assert len(statuses(lines)) == 7
    run_on(clip, "--json", lines, "--duration", 0.5)
    # 0, 0.08, ... 0.48.
    assert len(statuses(lines)) == 7


def test_lines_on_stdout(run_on, clip):
    done = run_on(clip, "--json", "-", "--max-frames", 4)
    assert len(lines_of(done.stdout)) == 4
    assert one_line(done.stderr).startswith("4 frames in ")


def test_images_and_one_that_is_none(run_on, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(1, 12):
        cv2.imwrite(str(folder / f"{index}.png"), picture(index, (64, 48) if index < 11 else (48, 64)))
    (folder / "5.png").write_bytes(b"garbage")
    film = tmp_path / "film.mp4"
    done = run_on(folder, "-o", film, "--fps", 5, exit_code=1)
    assert one_line(done.stderr) == f"heatlens: error: {folder / '5.png'}: cannot be read as an image; left out"
    fps, frames = read(film)
    assert fps == 5
    assert len(frames) == 10
    (folder / "5.png").unlink()
    run_on(folder / "*.png", "-o", film)
    fps, frames = read(film)
    assert (fps, len(frames)) == (25, 10)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}/nope.mp4", "-o", "{film}"], "No such file"),
        (["{garbage}", "-o", "{film}"], "cannot be opened as a video"),
        (["{folder}", "-o", "{film}"], "no images there"),
        (["{clip}", "-o", "{folder}/nope/film.mp4"], "there is no folder"),
        (["{clip}", "-o", "{clip}"], "is the input"),
        (["{clip}", "--json", "{clip}"], "is the input"),
        (["{clip}", "-o", "{film}", "--json", "{film}"], "is the film"),
        (["{clip}", "-o", "{folder}"], "is a folder"),
        (["{clip}", "-o", "{folder}/film.gif"], "ends in .mp4"),
        (["{clip}", "-o", "{film}", "--colormap", "nope"], "colormap: expected one of"),
        (["{clip}", "-o", "{film}", "--model", "nope"], "MODEL_NOT_FOUND"),
        (["{clip}", "-o", "{film}", "--model", "broken"], "MODEL_FAILED"),
        (["{clip}", "-o", "{film}", "--method", "nope"], "method: expected one of"),
        (["{clip}", "-o", "{film}", "--layer", "nope"], "unknown layer"),
        (["{clip}", "-o", "{film}", "--smooth", "1"], "smooth: expected"),
        (["{clip}", "-o", "{film}", "--timeout", "-1"], "timeout"),
    ],
)
def test_errors_are_one_line_and_write_nothing(run_on, clip, tmp_path, arguments, words):
    (tmp_path / "garbage.avi").write_bytes(b"garbage" * 100)
    (tmp_path / "folder").mkdir()
    names = {
        "folder": tmp_path / "folder",
        "film": tmp_path / "film.mp4",
        "garbage": tmp_path / "garbage.avi",
        "clip": clip,
    }
    before = clip.read_bytes()
    arguments = [argument.format(**names) for argument in arguments]
    done = run_on(*arguments, exit_code=1)
    assert words in one_line(done.stderr)
    assert done.stdout == ""
    assert not names["film"].exists()
    assert clip.read_bytes() == before


def test_nobody_there(run, clip, tmp_path):
    done = run(clip, "-o", tmp_path / "film.mp4", "--server", NOBODY, "--timeout", 5, exit_code=1)
    assert "[UNAVAILABLE" in one_line(done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-o", "film.mp4", "--raw", "--quality", 90],
        ["-o", "film.mp4", "--quality", 0],
        ["-o", "film.mp4", "--every", 0],
        ["-o", "film.mp4", "--max-fps", "nan"],
        ["-o", "film.mp4", "--duration", -1],
        ["-o", "film.mp4", "--fps", 0],
        ["-o", "film.mp4", "--alpha", 1.5],
        ["-o", "film.mp4", "--overflow", "wait"],
    ],
)
def test_usage(run_on, clip, arguments):
    run_on(clip, *arguments, exit_code=2)


def test_a_bad_frame_fails_alone(run, launch, tmp_path):
    server = launch(ONE_MODEL.format(name="poisonous"))
    wait_settled(server.address)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(6):
        pixels = np.full((48, 64, 3), 255, np.uint8) if index == 2 else picture(index, (64, 48))
        cv2.imwrite(str(folder / f"{index}.png"), pixels)
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    done = run(folder, "-o", film, "--json", lines, "--raw", "--server", server.address, exit_code=1)
    assert statuses(lines) == ["explained"] * 2 + ["failed"] + ["explained"] * 3
    failed = lines_of(lines.read_text())[2]
    assert failed["error"]["code"] == "INTERNAL"
    assert failed["classes"] == []
    assert "5 explained, 1 failed" in done.stdout
    _, frames = read(film)
    assert len(frames) == 6
    # Plain white below the banner, not coloured.
    assert frames[2][30:].min() > 230


def test_dropped_frames_are_in_the_film(run, launch, long_clip, tmp_path, monkeypatch):
    server = launch(ONE_MODEL.format(name="slow"), env={"SLOW_S": "0.05"})
    wait_settled(server.address)
    (tmp_path / "armed").touch()
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    options = ["--overflow", "drop-oldest", "--max-in-flight", 2, "--max-frames", 100, "--server", server.address]
    done = run(long_clip, "-o", film, "--json", lines, *options)
    count = Counter(statuses(lines))
    assert count["explained"] + count["dropped"] == 100
    assert count["dropped"] > 10
    assert count["explained"] > 1
    assert f"{count['dropped']} dropped" in done.stdout
    assert len(read(film)[1]) == 100


def test_a_stream_that_breaks_leaves_a_film(start, launch, long_clip, tmp_path):
    server = launch(ONE_MODEL.format(name="tiny"))
    wait_settled(server.address)
    film = tmp_path / "film.mp4"
    process = start(long_clip, "-o", film, "--json", "-", "--server", server.address)
    first = [process.stdout.readline() for _ in range(5)]
    server.process.kill()
    server.process.wait()
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    answers = lines_of("".join(first) + stdout)
    assert process.returncode == 1
    told, summary = stderr.splitlines()
    assert "[UNAVAILABLE" in told
    assert told.endswith(f"the last frame answered was {len(answers) - 1}")
    assert summary.startswith(f"{len(answers)} frames in ")
    assert 5 <= len(answers) < 3000
    assert len(read(film)[1]) == len(answers)


def test_an_interrupt_leaves_a_film(start, server, long_clip, tmp_path):
    film = tmp_path / "film.mp4"
    process = start(long_clip, "-o", film, "--json", "-", "--server", server.address)
    first = [process.stdout.readline() for _ in range(5)]
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    answers = lines_of("".join(first) + stdout)
    assert process.returncode == 130, stderr
    assert one_line(stderr).startswith(f"{len(answers)} frames in ")
    assert 5 <= len(answers) < 3000
    assert len(read(film)[1]) == len(answers)


class Camera(BaseHTTPRequestHandler):
    """Motion JPEG over HTTP, without end."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        index = 0
        while not self.server.over.wait(0.01):
            jpeg = cv2.imencode(".jpg", picture(index, (64, 48)))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + jpeg + b"\r\n")
            except OSError:
                return
            index += 1

    def log_message(self, *arguments):
        pass


@pytest.fixture
def camera():
    """The address of a camera that never stops."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Camera) as http:
        http.over = threading.Event()
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}/camera.mjpg"
        http.over.set()
        http.shutdown()
        thread.join(10)


def test_a_live_source(start, server, camera, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    process = start(camera, "-o", film, "--json", lines, "--fps", 20, "--duration", 1, "--server", server.address)
    _, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 0, stderr
    assert stderr == ""
    fps, frames = read(film)
    answers = lines_of(lines.read_text())
    assert fps == 20
    times = [answer["time_s"] for answer in answers]
    assert times == sorted(times)
    assert 0.5 < times[-1] < 1
    # The film runs as long as the camera did, whatever rate that had.
    assert len(frames) == round(times[-1] * 20) + 1


def test_an_interrupt_of_a_live_source(start, server, camera, tmp_path):
    film = tmp_path / "film.mp4"
    process = start(camera, "-o", film, "--json", "-", "--server", server.address)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 130, stderr
    assert len(read(film)[1]) >= 1
