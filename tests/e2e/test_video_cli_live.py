"""The real `heatlens video` when things go wrong, and on a camera: bad frames, drops, breaks, Ctrl-C."""

import signal
import socket
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest

from cli_process import next_line, start_cli
from server_process import wait_settled
from server_toml import model_toml, server_toml
from video_files import lines_of, one_line, picture, read_film, statuses, write_clip

QUICKLY_S = 60
CLIP_FRAMES = 100


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Longer than any test watches it."""
    return write_clip(tmp_path_factory.mktemp("clip") / "long.mov", frames=3000)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Longer than what is read and written ahead of the answers."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mov", frames=CLIP_FRAMES)


@pytest.fixture
def run(run):
    """Run `heatlens video` in this process."""
    return partial(run, "video")


@pytest.fixture
def start():
    """Start the command in a process of its own."""
    running = []

    def start(*arguments, **options):
        running.append(start_cli("video", *arguments, **options))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def test_a_bad_frame_fails_alone(run, launch, tmp_path):
    server = launch(server_toml(model_toml("poisonous")))
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
    assert failed["explanations"] == []
    assert "5 explained, 1 failed" in done.stdout
    _, frames = read_film(film)
    assert len(frames) == 6
    # Plain white below the banner, not coloured.
    assert frames[2][30:].min() > 230


@pytest.mark.serial
def test_dropped_frames_are_in_the_film(run, launch, long_clip, tmp_path, monkeypatch):
    server = launch(server_toml(model_toml("slow")), env={"SLOW_S": "0.05"})
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
    assert len(read_film(film)[1]) == 100


def test_a_stream_that_breaks_leaves_a_film(start, launch, long_clip, tmp_path):
    server = launch(server_toml(model_toml("tiny")))
    wait_settled(server.address)
    film = tmp_path / "film.mp4"
    process = start(long_clip, "-o", film, "--json", "-", "--server", server.address)
    first = [next_line(process) for _ in range(5)]
    server.process.kill()
    server.process.wait()
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    answers = lines_of("".join(first) + stdout)
    assert process.returncode == 1
    told, summary = stderr.splitlines()
    assert "[CONNECTION_LOST" in told
    assert told.endswith(f"the last frame answered was {len(answers) - 1}")
    assert summary.startswith(f"{len(answers)} frames in ")
    assert 5 <= len(answers) < 3000
    assert len(read_film(film)[1]) == len(answers)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_film(start, server, long_clip, tmp_path, number, exit_code):
    film = tmp_path / "film.mp4"
    process = start(long_clip, "-o", film, "--json", "-", "--server", server.address)
    first = [next_line(process) for _ in range(5)]
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    answers = lines_of("".join(first) + stdout)
    assert process.returncode == exit_code, stderr
    assert one_line(stderr).startswith(f"{len(answers)} frames in ")
    assert 5 <= len(answers) < 3000
    assert len(read_film(film)[1]) == len(answers)


def test_an_ignored_interrupt_changes_nothing(start, server, clip, tmp_path):
    """As under `nohup`, or in the background of a script."""
    film = tmp_path / "film.mp4"
    process = start(clip, "-o", film, "--json", "-", "--server", server.address, ignore_interrupts=True)
    first = [next_line(process) for _ in range(5)]
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 0, stderr
    assert len(lines_of("".join(first) + stdout)) == len(read_film(film)[1]) == CLIP_FRAMES


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


@pytest.mark.serial
def test_a_live_source(start, server, camera, tmp_path):
    film, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
    process = start(camera, "-o", film, "--json", lines, "--fps", 20, "--duration", 1, "--server", server.address)
    _, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 0, stderr
    assert stderr == ""
    fps, frames = read_film(film)
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
        next_line(process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=QUICKLY_S)
    assert process.returncode == 130, stderr
    assert len(read_film(film)[1]) >= 1


def test_an_interrupt_does_not_wait_for_a_url_that_hangs(start, tmp_path):
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(QUICKLY_S)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/clip.mp4"
        process = start(url, "-o", tmp_path / "film.mp4", "--server", "127.0.0.1:1", "--timeout", 50)
        connection, _ = silent.accept()
        with connection:
            start_s = time.monotonic()
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=QUICKLY_S)
            assert time.monotonic() - start_s < 10
    assert process.returncode == 130, stderr
    assert (stdout, stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_a_reader_of_stdout_that_leaves_is_no_error_message(start, server, long_clip):
    process = start(long_clip, "--json", "-", "--server", server.address)
    next_line(process)
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(QUICKLY_S) == 1
    assert stderr == ""
