"""`heatlens video` on cameras that drop out: they close, fall silent, come back, or stay away."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import pytest

from video_files import lines_of, one_line, picture, read_film

FRAMES = 6


class Camera(BaseHTTPRequestHandler):
    """Motion JPEG over HTTP: some frames a connection, as many connections as `server.connections` says."""

    def do_GET(self):
        camera = self.server
        camera.seen += 1
        if camera.seen > camera.connections:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for index in range(FRAMES):
            jpeg = cv2.imencode(".jpg", picture(index, (64, 48)))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + jpeg + b"\r\n")
            except OSError:
                return
            camera.over.wait(0.05)
        if camera.falls_silent:
            camera.over.wait()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def camera():
    """Start a camera; what it returns has its `url`."""
    started = []

    def start(*, connections, falls_silent=False):
        http = ThreadingHTTPServer(("127.0.0.1", 0), Camera)
        http.connections, http.falls_silent, http.seen, http.over = connections, falls_silent, 0, threading.Event()
        http.daemon_threads = True
        http.url = f"http://127.0.0.1:{http.server_port}/camera.mjpg"
        started.append((http, threading.Thread(target=http.serve_forever)))
        started[-1][1].start()
        return http

    yield start
    for http, thread in started:
        http.over.set()
        http.shutdown()
        http.server_close()
        thread.join(10)


@pytest.fixture
def film(run, server, tmp_path):
    """Film a camera; returns what the command printed, its lines of JSON and the frames of the film."""

    def film(url, *options, exit_code):
        path, lines = tmp_path / "film.mp4", tmp_path / "lines.jsonl"
        command = ["video", url, "-o", path, "--json", lines, "--fps", 20, "--server", server.address, *options]
        done = run(*command, exit_code=exit_code)
        return done, lines_of(lines.read_text()), read_film(path)[1]

    return film


@pytest.mark.parametrize("falls_silent", [False, True])
def test_a_camera_that_comes_back_goes_on(film, camera, falls_silent):
    http = camera(connections=100, falls_silent=falls_silent)
    wanted = FRAMES + 2
    done, answers, frames = film(http.url, "--max-frames", wanted, "--timeout", 2, exit_code=0)
    assert http.seen >= 2
    assert len(answers) == wanted
    # The film goes on as long as the camera was away: it holds the frame before.
    assert len(frames) == round(answers[-1]["time_s"] * 20) + 1
    dropped, back, *_ = done.stderr.splitlines()
    assert f"heatlens: {http.url}: dropped out: " in dropped
    assert f"heatlens: {http.url}: is back after " in back


@pytest.mark.parametrize("falls_silent", [False, True])
def test_a_camera_that_stays_away_is_an_error(film, camera, falls_silent):
    http = camera(connections=1, falls_silent=falls_silent)
    done, answers, frames = film(http.url, "--timeout", 2, "--reconnect-timeout", 1.5, exit_code=1)
    assert http.seen > 2
    assert len(answers) >= 1
    assert len(frames) >= 1
    dropped, error = done.stderr.splitlines()
    assert "dropped out: " in dropped
    assert f"heatlens: error: {http.url}: dropped out and did not come back within 1.5 s: " in error
    assert "503" in error or "5XX" in error


def test_a_camera_is_not_opened_again_if_so_asked(film, camera):
    http = camera(connections=100)
    done, answers, _ = film(http.url, "--reconnect-timeout", 0, exit_code=1)
    assert http.seen == 1
    assert 1 <= len(answers) <= FRAMES
    assert one_line(done.stderr).startswith(f"heatlens: error: {http.url}: dropped out: ")


@pytest.mark.parametrize("value", [-1, "nan", "inf"])
def test_a_wrong_time_to_reconnect(run, value):
    run("video", "0", "--json", "-", "--reconnect-timeout", value, exit_code=2)
