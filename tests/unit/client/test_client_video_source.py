"""Where frames of `heatlens video` come from."""

import threading
from fractions import Fraction

import cv2
import numpy as np
import pytest

from heatlens import InvalidArgumentError
from heatlens._video.live import LiveVideo
from heatlens._video.quiet import silence
from heatlens._video.source import letterbox, open_source

# OpenCV asks once, when it opens its first video, and these tests open some themselves.
silence()


@pytest.fixture
def unreadable():
    return []


@pytest.fixture
def opened(unreadable):
    """Open sources that are closed afterwards."""
    sources = []

    def open_one(text, fps=None):
        sources.append(open_source(str(text), fps=fps, timeout_s=5.0, on_unreadable=unreadable.append))
        return sources[-1]

    yield open_one
    for source in sources:
        source.close()
        source.close()


def gray(level, size=(48, 32)):
    return np.full((size[1], size[0], 3), level, np.uint8)


def write_clip(path, levels, fps=12.5, size=(48, 32)):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    for level in levels:
        writer.write(gray(level, size))
    writer.release()
    return path


def levels_of(frames):
    return [round(float(frame.pixels.mean())) for frame in frames]


def test_a_video_file(opened, tmp_path):
    source = opened(write_clip(tmp_path / "clip.mp4", [0, 50, 100, 150, 200]))
    assert (source.fps, source.size, source.live, source.total) == (12.5, (48, 32), False, 5)
    frames = list(source)
    assert [frame.frame_id for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.time_s for frame in frames] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32])
    assert levels_of(frames) == pytest.approx([0, 50, 100, 150, 200], abs=8)
    assert all(frame.pixels.shape == (32, 48, 3) for frame in frames)


def test_a_variable_frame_rate(opened, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    times = [index * 0.04 for index in range(15)] + [0.6 + index * 0.4 for index in range(15)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, time_s in enumerate(times):
            frame = av.VideoFrame.from_ndarray(gray(8 * index), format="rgb24")
            frame.pts, frame.time_base = round(time_s * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = opened(path)
    assert [frame.time_s for frame in source] == pytest.approx(times)
    # The average; containers differ in how long the last frame is.
    assert 30 / 6.6 <= source.fps <= 30 / 6.2
    assert source.lacking == 0
    # What the user says counts.
    assert [frame.time_s for frame in opened(path, fps=10)] == pytest.approx([index / 10 for index in range(30)])


def break_off(path, share):
    """Damage a Motion JPEG film from a part of it on; the index that tells how many frames there are stays."""
    data = bytearray(path.read_bytes())
    start, end = round(len(data) * share), data.rindex(b"idx1") - 8
    data[start:end] = bytes(end - start)
    path.write_bytes(data)


def write_motion_jpeg(path, frames):
    rng = np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    for _ in range(frames):
        writer.write(rng.integers(0, 256, (32, 48, 3), np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize("fps", [None, 3.0])
def test_a_film_that_breaks_off_lacks_frames(opened, tmp_path, capfd, fps):
    path = write_motion_jpeg(tmp_path / "clip.avi", 60)
    whole = opened(path, fps=fps)
    assert len(list(whole)) == whole.total == 60
    assert whole.lacking == 0
    break_off(path, 0.5)
    source = opened(path, fps=fps)
    frames = iter(source)
    next(frames)
    assert source.lacking == 0
    read = 1 + len(list(frames))
    assert 20 < read < 40
    assert source.total == 60
    assert source.lacking == 60 - read
    assert capfd.readouterr() == ("", "")


def test_a_source_that_is_closed_lacks_nothing(opened, tmp_path):
    source = opened(write_clip(tmp_path / "clip.mp4", [0] * 30))
    frames = iter(source)
    next(frames)
    source.close()
    assert list(frames) == []
    assert source.lacking == 0


def test_a_count_that_a_container_only_estimates_is_no_lack(opened, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mkv"
    # As screen recorders do: 30 a second, but a frame only where something moves.
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index in range(50):
            frame = av.VideoFrame.from_ndarray(gray(4 * index), format="rgb24")
            frame.pts = 5 * index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    source = opened(path)
    assert source.total > 200
    assert len(list(source)) == 50
    assert source.lacking == 0


@pytest.mark.parametrize("text", ["http://[", "9" * 20, "file:///tmp/clip.mp4"])
def test_what_is_no_input(opened, text):
    with pytest.raises(InvalidArgumentError, match="INPUT: "):
        opened(text)


def test_frames_are_rgb(opened, tmp_path):
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    writer.write(np.full((32, 48, 3), (200, 30, 30), np.uint8))  # blue, in OpenCV's order
    writer.release()
    (frame,) = opened(path)
    assert frame.pixels[16, 24] == pytest.approx([30, 30, 200], abs=12)


def test_the_users_rate_wins(opened, tmp_path):
    source = opened(write_clip(tmp_path / "clip.mp4", [0, 1]), fps=4.0)
    assert source.fps == 4.0
    assert [frame.time_s for frame in source] == [0, 0.25]


def test_a_folder_of_images_in_natural_order(opened, tmp_path):
    for index in (10, 2, 1):
        cv2.imwrite(str(tmp_path / f"frame{index}.png"), gray(index * 20))
    (tmp_path / "notes.txt").write_text("no image")
    source = opened(tmp_path)
    assert (source.fps, source.size, source.live, source.total) == (25.0, (48, 32), False, 3)
    assert levels_of(source) == [20, 40, 200]


def test_a_glob(opened, tmp_path):
    for index in range(4):
        cv2.imwrite(str(tmp_path / f"{'ab'[index % 2]}{index}.png"), gray(index * 20))
    assert levels_of(opened(tmp_path / "a*.png", fps=5)) == [0, 40]


def test_a_single_image(opened, chelsea_path, chelsea):
    (frame,) = opened(chelsea_path)
    np.testing.assert_array_equal(frame.pixels, chelsea)


def test_a_file_whose_name_looks_like_a_glob(opened, tmp_path):
    assert len(list(opened(write_clip(tmp_path / "clip[1].mp4", [0, 1])))) == 2


def test_a_file_whose_name_is_a_number(opened, tmp_path, monkeypatch):
    write_clip(tmp_path / "7.mp4", [0, 1]).rename(tmp_path / "7")
    monkeypatch.chdir(tmp_path)
    assert len(list(opened("7"))) == 2


def test_images_of_other_sizes_are_letterboxed(opened, tmp_path):
    cv2.imwrite(str(tmp_path / "1.png"), gray(9, (60, 40)))
    cv2.imwrite(str(tmp_path / "2.png"), gray(200, (40, 80)))
    frames = list(opened(tmp_path))
    assert [frame.pixels.shape for frame in frames] == [(40, 60, 3)] * 2
    assert (frames[1].pixels[:, 20:40] == 200).all()
    assert (frames[1].pixels[:, :20] == 0).all()
    assert (frames[1].pixels[:, 40:] == 0).all()


@pytest.mark.parametrize(
    ("columns", "rows", "box"), [(100, 50, (0, 12, 50, 25)), (50, 100, (12, 0, 25, 50)), (1, 900, (24, 0, 1, 50))]
)
def test_letterbox(columns, rows, box):
    left, top, width, height = box
    result = letterbox(np.full((rows, columns, 3), 77, np.uint8), (50, 50))
    expected = np.zeros((50, 50, 3), np.uint8)
    expected[top : top + height, left : left + width] = 77
    np.testing.assert_array_equal(result, expected)


def test_images_that_cannot_be_read_are_told_and_left_out(opened, unreadable, tmp_path):
    for index in (1, 3):
        cv2.imwrite(str(tmp_path / f"{index}.png"), gray(index * 20))
    for index in (0, 2):
        (tmp_path / f"{index}.png").write_bytes(b"garbage")
    frames = list(opened(tmp_path))
    assert levels_of(frames) == [20, 60]
    assert [frame.frame_id for frame in frames] == [0, 1]
    assert unreadable == [tmp_path / "0.png", tmp_path / "2.png"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.mp4", "No such file"),
        ("garbage.mp4", "cannot be opened as a video"),
        ("empty.mp4", "cannot be opened as a video"),
        ("folder", "no images there"),
        ("*.nothing", "no images there"),
        ("bad.png", "no image there can be read"),
    ],
)
def test_what_cannot_be_opened(opened, tmp_path, capfd, name, words):
    (tmp_path / "garbage.mp4").write_bytes(b"garbage" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "bad.png").write_bytes(b"garbage")
    (tmp_path / "folder").mkdir()
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


class Camera:
    """A capture that gives a frame whenever the test lets it."""

    def __init__(self):
        self.gate = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.released = False
        self.level = 0
        self.end = False

    def read(self):
        self.waiting.release()
        assert self.gate.acquire(timeout=10)
        self.level += 1
        return (False, None) if self.end else (True, gray(self.level))

    def release(self):
        self.released = True

    def shoot(self, count=1):
        """Give frames; returns once the reader has them all and waits for more."""
        for _ in range(count):
            self.gate.release()
            assert self.waiting.acquire(timeout=10)


def test_only_the_newest_frame_of_a_camera_is_kept():
    camera = Camera()
    video = LiveVideo(camera)
    assert camera.waiting.acquire(timeout=10)
    frames = iter(video)
    camera.shoot(3)
    taken_s, picture = next(frames)
    assert picture[0, 0, 0] == 3
    assert video.missed == 2
    camera.shoot()
    later_s, picture = next(frames)
    assert picture[0, 0, 0] == 4
    assert later_s > taken_s
    camera.end = True
    camera.gate.release()
    assert next(frames, None) is None
    video.close()
    assert camera.released


def test_closing_wakes_who_waits_for_a_camera():
    camera = Camera()
    video = LiveVideo(camera)
    ended = threading.Event()
    waiting = threading.Thread(target=lambda: list(video) or ended.set())
    waiting.start()
    camera.end = True
    camera.gate.release()
    video.close()
    waiting.join(10)
    assert ended.is_set()
    assert camera.released
