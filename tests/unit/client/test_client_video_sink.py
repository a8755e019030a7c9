"""Films are written, and read back by an independent reader."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from heatlens._video import sink as sink_module
from heatlens._video.quiet import silence
from heatlens._video.sink import H264, MPEG4, Film, open_sink

# OpenCV asks once, when it opens its first video, and these tests open some themselves.
silence()


@pytest.fixture(params=["av", "opencv"])
def codec(request, monkeypatch):
    """With the extra, and as if it was not installed."""
    if request.param == "av":
        pytest.importorskip("av")
        return H264
    monkeypatch.setattr(sink_module.importlib.util, "find_spec", lambda name: None)
    return MPEG4


def read(path):
    """Frames per second, and the frames as RGB."""
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        more, frame = capture.read()
        if not more:
            return capture.get(cv2.CAP_PROP_FPS), frames
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))


def picture(level, size=(64, 48)):
    return np.full((size[1], size[0], 3), (level, 255 - level, 40), np.uint8)


@pytest.mark.parametrize("fps", [25.0, 30000 / 1001, 12.5, 0.5, 100.0])
def test_what_is_written_is_read_back(codec, tmp_path, capfd, fps):
    path = tmp_path / "film.mp4"
    film = open_sink(path, fps=fps, size=(64, 48))
    levels = [10, 90, 170, 240]
    for index, level in enumerate(levels):
        film.write(picture(level), index / fps)
    film.close()
    film.close()
    assert film.codec == codec
    written_fps, frames = read(path)
    assert written_fps == pytest.approx(fps, rel=1e-4)
    assert len(frames) == 4
    for level, frame in zip(levels, frames, strict=True):
        np.testing.assert_allclose(frame.mean((0, 1)), [level, 255 - level, 40], atol=6)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("size", "stored"), [((63, 47), (64, 48)), ((64, 47), (64, 48)), ((17, 16), (18, 16))])
def test_odd_sizes_get_a_copy_of_the_last_pixel(codec, tmp_path, size, stored):
    path = tmp_path / "film.mp4"
    film = open_sink(path, fps=10, size=size)
    pixels = picture(40, size)
    film.write(pixels, 0.0)
    film.close()
    _, (frame,) = read(path)
    assert frame.shape == (stored[1], stored[0], 3)
    np.testing.assert_allclose(frame[-1, -1], pixels[-1, -1], atol=12)


@pytest.mark.parametrize("suffix", sink_module.SUFFIXES)
def test_containers(codec, tmp_path, suffix):
    path = tmp_path / f"film{suffix}"
    film = open_sink(path, fps=25, size=(64, 48))
    film.write(picture(100), 0.0)
    film.close()
    assert len(read(path)[1]) == 1


def test_h264_is_what_browsers_play(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    film = open_sink(path, fps=25, size=(64, 48))
    film.write(picture(100), 0.0)
    film.close()
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        # BT.601, as the pixels were converted.
        assert int(stream.codec_context.colorspace) == 6
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def test_a_file_that_cannot_be_written(codec, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        open_sink(tmp_path / "missing" / "film.mp4", fps=25, size=(64, 48))
    assert caught.value.filename == str(tmp_path / "missing" / "film.mp4")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_an_os_error(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "film.mkv"
    path.symlink_to("/dev/full")
    film = open_sink(path, fps=25, size=(64, 48))

    def write():
        for index in range(50):
            film.write(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), index / 25)
        film.close()

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert caught.value.filename == str(path)


class Tape:
    """A sink that remembers."""

    codec = "none"

    def __init__(self, *, any_time=True):
        self.any_time = any_time
        self.levels = []
        self.times = []
        self.closed = 0

    def write(self, pixels, time_s):
        self.levels.append(int(pixels[0, 0, 0]))
        self.times.append(time_s)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("slots", "written"),
    [
        ([0, 1, 2], [10, 11, 12]),
        # Late: the frame before is held.
        ([0, 3, 4], [10, 10, 10, 11, 12]),
        # Early: two frames for one place, the first one stays.
        ([0, 0, 1, 1, 2], [10, 12, 14]),
        # A film that starts late starts with its first frame.
        ([2, 3], [10, 10, 10, 11]),
    ],
)
@pytest.mark.parametrize(("steady", "any_time"), [(True, True), (True, False), (False, False)])
def test_a_steady_film_keeps_its_rate(steady, any_time, slots, written):
    tape = Tape(any_time=any_time)
    film = Film(tape, fps=5.0, steady=steady)
    for index, slot in enumerate(slots):
        film.add(picture(10 + index), slot / 5)
    film.close()
    assert tape.levels == written
    assert tape.times == pytest.approx([index / 5 for index in range(len(written))])
    assert film.written == len(written)
    assert tape.closed == 1


def test_another_film_shows_every_frame_at_its_time():
    tape = Tape()
    film = Film(tape, fps=5.0, steady=False)
    times = [0.0, 0.01, 0.02, 3.0]
    for index, time_s in enumerate(times):
        film.add(picture(10 + index), time_s)
    assert tape.levels == [10, 11, 12, 13]
    assert tape.times == times
    assert film.written == 4


@pytest.mark.parametrize("suffix", sink_module.SUFFIXES)
def test_a_variable_frame_rate_is_kept(tmp_path, capfd, suffix):
    av = pytest.importorskip("av")
    path = tmp_path / f"film{suffix}"
    times = [index * 0.04 for index in range(15)] + [0.6 + index * 0.4 for index in range(15)]
    film = open_sink(path, fps=30 / 6.6, size=(64, 48))
    for index, time_s in enumerate(times):
        film.write(picture(8 * index), time_s)
    film.close()
    with av.open(str(path)) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(times, abs=1e-3)
    with av.open(str(path)) as container:
        # The last frame is within the film's length.
        assert container.duration / 1e6 > times[-1]
    # No chatter of FFmpeg about options that a container does not know.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("size", [(16_386, 4), (4, 16_386), (20_000, 64)])
def test_a_film_too_large_for_h264(tmp_path, size):
    pytest.importorskip("av")
    path = tmp_path / "film.mp4"
    path.write_bytes(b"precious")
    with pytest.raises(OSError, match=f"H.264 has no films of {size[0]}x{size[1]} pixels") as caught:
        open_sink(path, fps=25, size=size)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"precious"


def test_the_command_line_starts_without_the_extra():
    program = "import sys, heatlens._cli, heatlens._video.sink; print('av' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
