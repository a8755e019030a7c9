"""Video files, URLs and cameras."""

import math
import socket
import threading
from contextlib import suppress
from itertools import pairwise

import av
import cv2
import numpy as np
import pytest
from av.stream import Disposition

from heatlens._video.inputs import open_source
from heatlens._video.pyav import MAX_STEP_S, LiveVideo, Reconnection, open_video, step_s
from video_files import break_off, write_video


@pytest.fixture
def opened():
    """Open sources that are closed afterwards."""
    sources = []

    def open_one(text, fps=None, timeout_s=5.0):
        told = {"on_unreadable": pytest.fail, "tell": pytest.fail}
        sources.append(open_source(str(text), fps=fps, timeout_s=timeout_s, reconnect_timeout_s=5.0, **told))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()
        source.close()


def gray(level, size=(48, 32)):
    return np.full((size[1], size[0], 3), level, np.uint8)


def grays(count):
    return [gray(4 * index) for index in range(count)]


def noise(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 48, 3), np.uint8) for _ in range(count)]


def cut_off(path, share):
    path.write_bytes(path.read_bytes()[: round(path.stat().st_size * share)])


def levels_of(frames):
    return [round(float(frame.pixels.mean())) for frame in frames]


def test_a_video_file(opened, tmp_path):
    levels = [0, 50, 100, 150, 200]
    source = opened(write_video(tmp_path / "clip.mp4", [gray(level) for level in levels]))
    assert (source.fps, source.size, source.live, source.total) == (12.5, (48, 32), False, 5)
    frames = list(source)
    assert [frame.frame_id for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32])
    assert levels_of(frames) == pytest.approx(levels, abs=8)
    assert all(frame.pixels.shape == (32, 48, 3) for frame in frames)


def test_frames_are_rgb(opened, tmp_path):
    blue = np.full((32, 48, 3), (30, 30, 200), np.uint8)
    (frame,) = opened(write_video(tmp_path / "clip.avi", [blue], codec="mjpeg", pix_fmt="yuvj420p"))
    assert frame.pixels[16, 24] == pytest.approx([30, 30, 200], abs=12)


@pytest.mark.parametrize(("rotation", "quarter_turns"), [(90, 1), (180, 2), (-90, 3)])
def test_a_film_of_a_phone_that_was_turned(opened, tmp_path, rotation, quarter_turns):
    stored = np.zeros((32, 48, 3), np.uint8)
    stored[:16, :24] = 200
    path = write_video(tmp_path / "clip.mp4", [stored], rotation=rotation)
    upright = np.rot90(stored, quarter_turns)
    source = opened(path)
    assert source.size == upright.shape[1::-1]
    (frame,) = source
    np.testing.assert_allclose(frame.pixels.astype(float), upright, atol=20)
    # Another reader agrees on what is upright.
    np.testing.assert_allclose(cv2.VideoCapture(str(path)).read()[1].astype(float), upright, atol=20)


def test_a_variable_frame_rate(opened, tmp_path):
    times = [index * 0.04 for index in range(15)] + [0.6 + index * 0.4 for index in range(15)]
    path = write_video(tmp_path / "clip.mp4", grays(30), 25, times_s=times)
    source = opened(path)
    assert [frame.time_s for frame in source] == pytest.approx(times)
    # The average; containers differ in how long the last frame is.
    assert 30 / 6.6 <= source.fps <= 30 / 6.2
    assert source.missing == 0
    # What the user says counts.
    assert [frame.time_s for frame in opened(path, fps=10)] == pytest.approx([index / 10 for index in range(30)])


def test_the_users_rate_wins(opened, tmp_path):
    source = opened(write_video(tmp_path / "clip.mp4", grays(2)), fps=4.0)
    assert source.fps == 4.0
    assert [frame.time_s for frame in source] == [0, 0.25]


def test_frames_without_timestamps(opened, tmp_path):
    source = opened(write_video(tmp_path / "clip.h264", grays(10), codec="libx264"))
    assert (source.total, source.live) == (None, False)
    assert np.diff([frame.time_s for frame in source]) == pytest.approx(1 / source.fps)
    assert source.missing == 0


@pytest.mark.parametrize(
    ("before_s", "now_s", "step"),
    [
        (0.1, 0.9, 0.8),
        (0, MAX_STEP_S, MAX_STEP_S),
        (77.5, 77.5, 0.25),
        (None, 0.1, 0.25),
        (0.1, None, 0.25),
        (0.1, math.nan, 0.25),
        # Back, and a jump that is no pause.
        (5.1, 1, 0.25),
        (0.1, 95_443, 0.25),
    ],
)
def test_steps_by_timestamps_good_and_bad(before_s, now_s, step):
    assert step_s(before_s, now_s, 0.25) == pytest.approx(step)


@pytest.mark.parametrize("fps", [None, 3.0])
def test_a_damaged_film_lacks_frames(opened, tmp_path, capfd, fps):
    path = write_video(tmp_path / "clip.avi", noise(60), 10, codec="mjpeg", pix_fmt="yuvj420p")
    whole = opened(path, fps=fps)
    assert len(list(whole)) == whole.total == 60
    assert whole.missing == 0
    break_off(path, 0.5)
    source = opened(path, fps=fps)
    frames = iter(source)
    next(frames)
    assert source.missing == 0
    read = 1 + len(list(frames))
    assert 20 < read < 40
    assert source.total == 60
    assert source.missing == 60 - read
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("sound_s", [0, 8])
def test_a_download_that_was_cut_off_lacks_frames(opened, tmp_path, sound_s):
    path = write_video(tmp_path / "clip.mkv", noise(60), 10, sound_s=sound_s)
    whole = opened(path)
    assert len(list(whole)) == whole.total == 60
    # Not for sound that is longer.
    assert whole.missing == 0
    cut_off(path, 0.5)
    source = opened(path)
    read = len(list(source))
    assert 1 < read < 50
    assert source.missing == 60 - read


def test_a_source_that_is_closed_lacks_nothing(opened, tmp_path):
    source = opened(write_video(tmp_path / "clip.mp4", grays(30)))
    frames = iter(source)
    next(frames)
    source.close()
    assert list(frames) == []
    assert source.missing == 0


def test_a_count_that_a_container_only_estimates_is_no_lack(opened, tmp_path):
    # As screen recorders do: 30 a second, but a frame only where something moves.
    path = write_video(tmp_path / "clip.mkv", grays(50), 30, times_s=[index / 6 for index in range(50)])
    source = opened(path)
    assert source.total > 200
    assert len(list(source)) == 50
    assert source.missing == 0


def test_a_film_without_a_stated_length(opened, tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w", container_options={"live": "1"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = 48, 32
        for pixels in grays(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    source = opened(path)
    assert (source.total, source.live) == (None, False)
    assert len(list(source)) == 10
    assert source.missing == 0


@pytest.mark.parametrize("name", ["clip[1].mp4", "7", "file:a.mp4", "a%d.mp4", "http:x.mp4"])
def test_a_file_with_a_strange_name(opened, tmp_path, monkeypatch, name):
    write_video(tmp_path / "clip.mp4", grays(2)).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(list(opened(name))) == 2


def write_song(path, *, cover):
    with av.open(str(path), "w") as container:
        sound = container.add_stream("pcm_s16le" if path.suffix == ".wav" else "aac", rate=8000, layout="mono")
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 48, 32, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(gray(9), format="rgb24")))
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
        silence.sample_rate = 8000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.mp4", "No such file"),
        ("garbage.mp4", "cannot be opened as a video"),
        ("empty.mp4", "cannot be opened as a video"),
        ("headless.mp4", "cannot be opened as a video"),
        ("song.wav", "holds no video"),
        # To FFmpeg, the cover of an album is a video.
        ("album.mp4", "holds no video"),
    ],
)
def test_what_is_no_video(opened, tmp_path, capfd, name, words):
    (tmp_path / "garbage.mp4").write_bytes(b"garbage" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    cut_off(write_video(tmp_path / "headless.mp4", noise(20)), 0.5)
    write_song(tmp_path / "song.wav", cover=False)
    write_song(tmp_path / "album.mp4", cover=True)
    with pytest.raises(OSError, match=words) as caught:
        opened(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert capfd.readouterr() == ("", "")


def test_a_camera_that_is_not_there(opened, capfd):
    with pytest.raises(OSError, match="cannot be opened") as caught:
        opened("97")
    assert caught.value.filename == "camera 97"
    assert capfd.readouterr().err == ""


def test_a_url_that_nobody_serves_is_told_without_its_password(opened, capfd):
    with pytest.raises(OSError, match="cannot be opened") as caught:
        opened("http://me:secret@127.0.0.1:1/clip.mp4")
    assert caught.value.filename == "http://127.0.0.1:1/clip.mp4"
    assert capfd.readouterr().err == ""


@pytest.fixture
def serve():
    """Serve bytes over HTTP, as the start of a file of `length` bytes, and then say nothing more."""
    connections, threads = [], []

    def answer(listening, data, length):
        # Until the listening socket is shut down.
        with suppress(OSError):
            while True:
                connections.append(listening.accept()[0])
                connections[-1].recv(65_536)
                connections[-1].sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode() + data)

    def serve(data, length):
        threads.append(threading.Thread(target=answer, args=(listening, data, length)))
        threads[-1].start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/clip.mkv"

    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield serve
        listening.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()
        for thread in threads:
            thread.join(10)


def test_a_finite_url_waits_for_its_reader(opened, serve, tmp_path):
    data = write_video(tmp_path / "clip.mkv", noise(30)).read_bytes()
    source = opened(serve(data, len(data)))
    assert (source.live, source.total) == (False, 30)
    assert len(list(source)) == 30


def test_a_url_that_stops_in_the_middle_is_told(opened, serve, tmp_path):
    data = write_video(tmp_path / "clip.mkv", noise(300)).read_bytes()
    source = opened(serve(data[: len(data) // 2], len(data)), timeout_s=1)
    frames = iter(source)
    for _ in range(20):
        next(frames)
    with pytest.raises(TimeoutError, match="reading failed: no answer before the timeout"):
        list(frames)
    assert source.missing == 0


def test_a_url_that_does_not_answer(opened, serve):
    with pytest.raises(TimeoutError, match="cannot be opened as a video: no answer before the timeout"):
        opened(serve(b"", 1000), timeout_s=0.2)


class Camera:
    """Gives a frame whenever the test lets it."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.released = threading.Event()
        self.end = None

    def frames(self):
        level = 0
        try:
            while True:
                self.waiting.release()
                assert self.gate.acquire(timeout=10)
                if self.end is not None:
                    self.end()
                    return
                level += 1
                yield av.VideoFrame.from_ndarray(gray(level), format="rgb24")
        finally:
            self.released.set()

    def shoot(self, count=1):
        """Give frames; returns once the reader has them all and waits for more."""
        for _ in range(count):
            self.gate.release()
            assert self.waiting.acquire(timeout=10)

    def stop(self, end=lambda: None):
        self.end = end
        self.gate.release()


@pytest.fixture
def camera():
    return Camera()


@pytest.fixture
def live(camera):
    live = LiveVideo(camera.frames(), fps=25, size=(48, 32))
    assert camera.waiting.acquire(timeout=10)
    yield live
    camera.stop()
    live.close()
    assert camera.released.wait(10)


def test_only_the_newest_frame_of_a_camera_is_kept(camera, live):
    frames = iter(live)
    camera.shoot(3)
    first = next(frames)
    assert (first.frame_id, first.time_s, first.pixels[0, 0, 0]) == (0, 0, 3)
    assert live.lost == 2
    camera.shoot()
    later = next(frames)
    assert (later.frame_id, later.pixels[0, 0, 0]) == (1, 4)
    assert later.time_s > 0
    camera.stop()
    assert next(frames, None) is None


def test_a_device_of_ffmpeg_is_live():
    source = open_video("testsrc=size=48x32:rate=20:duration=0.5", "a device", fps=None, live=True, format_name="lavfi")
    assert (source.live, source.size, source.fps, source.total) == (True, (48, 32), 20, None)
    frames = list(source)
    source.close()
    # The first frame told the size.
    assert len(frames) + source.lost == 9
    assert all(earlier.time_s < later.time_s for earlier, later in pairwise(frames))


def test_closing_wakes_who_waits_for_a_camera(camera, live):
    ended = threading.Event()
    waiting = threading.Thread(target=lambda: list(live) or ended.set())
    waiting.start()
    camera.stop()
    live.close()
    waiting.join(10)
    assert ended.is_set()


def test_a_camera_that_is_unplugged_is_told(camera, live):
    def unplugged():
        raise OSError(19, "No such device", "camera 0")

    camera.stop(unplugged)
    with pytest.raises(OSError, match="No such device"):
        list(live)


def test_a_device_that_ends_is_opened_again():
    told = []
    source = open_video(
        "testsrc=size=48x32:rate=20:duration=0.3",
        "a device",
        fps=None,
        live=True,
        format_name="lavfi",
        reconnection=Reconnection(silence_s=30, timeout_s=30, tell=told.append),
    )
    frames = iter(source)
    # Three times the frames that one opening gives.
    times = [next(frames).time_s for _ in range(18)]
    source.close()
    assert all(earlier < later for earlier, later in pairwise(times))
    assert len(told) >= 4
    assert told[0] == "a device: dropped out: its frames ended; it is opened again for 30 s"
    assert told[1].startswith("a device: is back after ")


def test_a_camera_that_hangs_is_told(camera):
    live = LiveVideo(camera.frames(), fps=25, size=(48, 32), name="camera 0", hang_s=0.1)
    with pytest.raises(TimeoutError, match=r"gave no frame for 0\.1 s") as caught:
        list(live)
    assert caught.value.filename == "camera 0"
    camera.stop()
    live.close()
    assert camera.released.wait(10)


def test_a_finite_url_without_a_stated_length_is_not_live(opened, serve, tmp_path):
    data = b"".join(cv2.imencode(".jpg", picture)[1].tobytes() for picture in noise(20))
    source = opened(serve(data, len(data)).replace(".mkv", ".mjpeg"))
    assert (source.live, source.total) == (False, None)
    assert len(list(source)) == 20
